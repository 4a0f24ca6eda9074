"""Which files paths, folders and patterns stand for, and what of them is left out."""

from __future__ import annotations

import filecmp
import glob
import hashlib
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from megalr.data.readers import SUFFIXES, suffix
from megalr.errors import UserError, some_of

_SHOWN_KINDS = 8
_LOOKED_AT = 1 << 16  # bytes at three places of a file, by which most of those of one size differ


def local_files(names: Sequence[str]) -> tuple[list[Path], str]:
    """The files that paths, folders (searched deeply) and globs stand for, sorted within each; each once.

    A file that holds byte for byte what an earlier one does is left out: its copy could be trained on and held out.

    Returns:
        The files, and in words what is left out: copies, and what folders and globs hold beside them: other kinds,
        hidden and empty files, folders that cannot be read. "" if there is nothing of that sort.

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
    copies = copies_among(list(found.values()))
    if copies:
        pairs = some_of([f"{copy} (of {first})" for copy, first in copies.items()])
        count = "1 copy of another file" if len(copies) == 1 else f"{len(copies):,} copies of other files"
        words.append(f"left out, since a copy of what is trained on must not be held out: {count}: {pairs}")
    return [file for file in found.values() if file not in copies], "\n".join(words)


def copies_among(files: Sequence[Path]) -> dict[Path, Path]:
    """Files that hold byte for byte what an earlier one does, and which; hard links are copies, too, empty files none.

    Only files of one size are read, and of these in full only those that agree in three places.

    Raises:
        UserError: a file that cannot be read.
    """
    copies: dict[Path, Path] = {}
    try:
        by_size: dict[int, list[Path]] = {}
        for file in files:
            by_size.setdefault(file.stat().st_size, []).append(file)
        for size, alike in by_size.items():
            firsts: dict[bytes, list[Path]] = {}
            for file in alike if size and len(alike) > 1 else ():
                others = firsts.setdefault(_glance(file, size), [])
                same = next((each for each in others if _is_copy(file, each)), None)
                if same is None:
                    others.append(file)
                else:
                    copies[file] = same
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error
    return copies


def _glance(file: Path, size: int) -> bytes:
    """A hash of the file's head, middle and tail."""
    found = hashlib.sha256()
    with file.open("rb") as stream:
        for place in (0, (size - _LOOKED_AT) // 2, size - _LOOKED_AT):
            stream.seek(max(0, place))
            found.update(stream.read(_LOOKED_AT))
    return found.digest()


def _is_copy(file: Path, other: Path) -> bool:
    return file.samefile(other) or filecmp.cmp(file, other, shallow=False)


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
