"""What there is in a folder: a checkpoint, several, of which the newest that is whole is wanted, or something else."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from megalr.checkpoint.inputs import read_inside
from megalr.checkpoint.manifest import (
    LATEST,
    MANIFEST,
    RANK_FILES,
    Manifest,
    OtherVersionError,
    ReplacedError,
    problems,
    read_manifest,
    read_whole,
)
from megalr.errors import UserError
from megalr.hosts.deepspeed import CHECKPOINT_FILES

LOST_AND_FOUND = "lost+found"  # of a file system of its own, for nobody but root
LONGEST_NAME = 255  # bytes; file systems take no longer ones
LOOKS = 3  # at what others may be replacing
T = TypeVar("T")


@dataclass(frozen=True)
class Listed:
    """One folder of a directory of checkpoints.

    Attributes:
        folder: where it is.
        manifest: what it says of itself; None where that cannot be read.
        wrong: why not; empty where it can.
        is_open: whether this process may look into it; nothing is known of one that it may not.
        is_damaged: whether that is damage; otherwise another version of megalr has written it.
    """

    folder: Path
    manifest: Manifest | None
    wrong: str = ""
    is_open: bool = True
    is_damaged: bool = False


def look_at(folder: Path) -> Listed:
    """A checkpoint's folder, its data not looked at."""
    try:
        return Listed(folder, read_manifest(folder))
    except UserError as error:
        return Listed(folder, None, str(error), is_damaged=not isinstance(error, OtherVersionError))


def is_one(place: Path) -> bool:
    """Whether a folder is one checkpoint; a damaged one is, too. Otherwise it is the directory of several.

    Raises:
        UserError: it is neither, and what it is instead.
    """
    if not place.is_dir():
        raise UserError(f"{place} is a file: name a checkpoint's folder" if place.exists() else f"there is no {place}")
    if _is_checkpoint(place):
        return True
    if any(_is_checkpoint(folder) for folder in _folders(place)):
        return False
    if any(next(place.glob(f"{depth}{files}"), None) for depth in ("", "*/", "*/*/") for files in CHECKPOINT_FILES):
        raise UserError(
            f"{place} holds checkpoints of DeepSpeed's own, which engine.save_checkpoint writes: load them with "
            "engine.load_checkpoint, or make fp32 weights of one with the zero_to_fp32.py that lies beside it. This "
            "tool reads what megalr.save_checkpoint writes"
        )
    raise UserError(f"{place} holds no checkpoint that megalr.save_checkpoint has written")


def listed(directory: Path) -> list[Listed]:
    """The checkpoints in a directory, newest first, their data not looked at; those that cannot be read come last.

    What an interrupted save or deletion has left is none of them, and the next save removes it. A folder that cannot be
    looked into may be one.
    """
    found = []
    for folder in _folders(directory):
        hidden = folder.name.startswith(".")
        try:
            ours = os.path.isfile(folder / MANIFEST) if hidden else _looks_like_one(folder)
        except OSError as error:
            if folder.name != LOST_AND_FOUND:
                found.append(Listed(folder, None, f"{folder} cannot be read: {error.strerror}", is_open=False))
            continue
        if ours:
            found.append(look_at(folder))
    return sorted(found, key=lambda each: each.manifest.order if each.manifest else -1, reverse=True)


def candidates(directory: Path) -> list[Manifest]:
    """Those that can be read."""
    return [each.manifest for each in listed(directory) if each.manifest is not None]


def newest_valid(directory: Path, besides: Path | None = None) -> tuple[Manifest | None, list[str]]:
    """The newest checkpoint whose data is as it was written, and what was passed over and why.

    Args:
        directory: what :func:`megalr.save_checkpoint` was given.
        besides: one that is not looked at.

    Raises:
        ReplacedError: each time that it was looked for another save took the place of one.
    """
    return _again(lambda: _newest_valid(directory, besides))


def newest_whole(directory: Path) -> tuple[Manifest, list[str]]:
    """The same where there has to be one.

    Raises:
        UserError: there is none, and why or what there is instead.
    """
    manifest, skipped = newest_valid(directory)
    if manifest is not None:
        return manifest, skipped
    if not skipped and is_one(directory):
        read_manifest(directory)
    raise UserError("\n  ".join([f"no checkpoint in {directory} can be loaded:", *skipped]))


def latest(directory: Path) -> str | None:
    """The name in the file ``latest``; None where there is no such file, or another kind of text in it."""
    try:
        name = read_inside(directory, LATEST, LONGEST_NAME + 1).decode().strip()
    except (OSError, ValueError):
        return None
    return name if name.isprintable() and name == os.path.basename(name) else None


def whole_checkpoint(place: Path) -> tuple[Manifest, list[str]]:
    """A checkpoint all of whose files have been read and are as they were written.

    Args:
        place: a checkpoint's folder, or the directory of several, of which it is the newest that is whole.

    Returns:
        The checkpoint, and which newer ones were passed over and why.

    Raises:
        UserError: it is damaged, naming what is and the newest other one that is not; or there is none.
    """
    return (read_or_offer(place, place, "Nothing was written"), []) if is_one(place) else newest_whole(place)


def read_or_offer(folder: Path, place: Path, outcome: str) -> Manifest:
    """A checkpoint all of whose files have been read and are as they were written.

    Args:
        folder: where it lies.
        place: its folder under its own name; the other checkpoints are beside it.
        outcome: what has not been done if it is damaged, as a sentence for the error.

    Raises:
        UserError: it is damaged; with what is, and the newest other one that is not.
    """
    try:
        return _again(lambda: read_whole(folder))
    except ReplacedError:
        raise
    except UserError as error:
        other, _ = newest_valid(place.parent, besides=place)
        offer = f'the newest that is whole is "{other.folder.name}"' if other else "no other is whole"
        raise UserError(f"{error}\n{outcome}; of the checkpoints in {place.parent} {offer}") from error


def _newest_valid(directory: Path, besides: Path | None) -> tuple[Manifest | None, list[str]]:
    others = [each for each in listed(directory) if each.folder != besides]
    skipped = [each.wrong for each in others if each.manifest is None]
    for manifest in [each.manifest for each in others if each.manifest is not None]:
        wrong = problems(manifest)
        if not wrong:
            return manifest, skipped
        skipped.append(wrong[0] + (f" (and {len(wrong) - 1} more files)" if wrong[1:] else ""))
    return None, skipped


def _again(look: Callable[[], T]) -> T:
    """What it finds, in another attempt if another save has just taken the place of what it looked at."""
    for _ in range(LOOKS - 1):
        with suppress(ReplacedError):
            return look()
    return look()


def _is_checkpoint(folder: Path) -> bool:
    try:
        return _looks_like_one(folder)
    except OSError:
        return False


def _looks_like_one(folder: Path) -> bool:
    """Whether a checkpoint's files are in it.

    Raises:
        OSError: it cannot be read.
    """
    try:
        names = os.listdir(folder)
    except FileNotFoundError:  # another process has just removed it
        return False
    return MANIFEST in names or bool(fnmatch.filter(names, RANK_FILES))


def _folders(directory: Path) -> list[Path]:
    if not os.path.isdir(directory):
        return []
    try:
        return sorted(folder for folder in directory.iterdir() if os.path.isdir(folder))
    except OSError as error:
        raise UserError(f"{directory} cannot be read: {error.strerror}") from error
