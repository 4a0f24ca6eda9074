"""Which files paths, folders and patterns stand for, and what of them is left out."""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from megalr.data.readers import SUFFIXES, suffix
from megalr.errors import UserError

_SHOWN_KINDS = 8


def local_files(names: Sequence[str]) -> tuple[list[Path], str]:
    """The files that paths, folders (searched deeply) and globs stand for, sorted within each; each once.

    Returns:
        The files, and in words what folders and globs hold beside them: other kinds, hidden and empty files, folders
        that cannot be read. "" if there is nothing of that sort.

    Raises:
        UserError: a name that stands for no readable file.
    """
    found: dict[Path, Path] = {}  # a file named twice is read once: otherwise it could be trained on and held out
    words = []
    for name in names:
        files, left_out = _expand(name)
        for file in files:
            found.setdefault(file.resolve(), file)
        if left_out:
            words.append(f"left out of {name}: {_in_words(left_out)} ({', '.join(SUFFIXES)} are read)")
    return list(found.values()), "\n".join(words)


def _expand(name: str) -> tuple[list[Path], Counter[str]]:
    path = Path(name).expanduser()
    left_out: Counter[str] = Counter()
    if path.is_file():
        if suffix(path) not in SUFFIXES:
            raise UserError(f"{name} ends in none of {', '.join(SUFFIXES)}; rename plain text to .txt, or convert it")
        return [path], left_out
    if path.is_dir():
        candidates = _files_below(path, left_out)
    else:
        candidates = [Path(match) for match in glob.glob(str(path), recursive=True)]
        if not candidates:
            raise UserError(f"there is no file, folder or match of a pattern called {name}")
    files = sorted(file for file in candidates if _is_text(file, left_out))
    if not files:
        holds = f": it holds {_in_words(left_out)}" if left_out else ""
        raise UserError(f"{name} holds no file that ends in one of {', '.join(SUFFIXES)}{holds}")
    return files, left_out


def _files_below(folder: Path, left_out: Counter[str]) -> list[Path]:
    """All files but hidden ones; links to folders are not followed."""

    def unreadable(error: OSError) -> None:
        left_out[f"folder that cannot be read ({error.filename}: {error.strerror})"] += 1

    found = []
    for parent, folders, files in os.walk(folder, onerror=unreadable):
        for name in [each for each in folders if each.startswith(".") or os.path.islink(os.path.join(parent, each))]:
            folders.remove(name)
            left_out["hidden folder" if name.startswith(".") else "link to a folder"] += 1
        for name in files:
            if name.startswith("."):
                left_out["hidden file"] += 1
            else:
                found.append(Path(parent, name))
    return found


def _is_text(file: Path, left_out: Counter[str]) -> bool:
    """Whether to read it; counts why not."""
    if not file.is_file():
        left_out["folder" if file.is_dir() else "thing that is no file"] += 1
    elif suffix(file) not in SUFFIXES:
        left_out[file.suffix.lower() or "file without a suffix"] += 1
    elif file.stat().st_size == 0:
        left_out["empty file"] += 1
    else:
        return True
    return False


def _in_words(left_out: Counter[str]) -> str:
    ordered = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    kinds = [f"{count:,} {kind if count == 1 else _plural(kind)}" for kind, count in ordered]
    more = [f"{len(kinds) - _SHOWN_KINDS} more kinds"] if len(kinds) > _SHOWN_KINDS else []
    return ", ".join(kinds[:_SHOWN_KINDS] + more)


def _plural(kind: str) -> str:
    return kind if kind.startswith(".") else re.sub(r"\b(file|folder|link|thing)\b", r"\1s", kind, count=1)
