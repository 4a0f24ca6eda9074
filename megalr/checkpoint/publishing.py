"""How a checkpoint gets its name, and how it goes: whatever is interrupted, what was there before stays.

``DIR/<tag>/manifest.json`` is written last of all, when every file that it names is on the disk, into a folder whose
name begins with a dot; then the folder is renamed, and then ``DIR/latest`` names it. A deletion hides the folder first
and removes its manifest before all else. So a folder with a manifest is whole, hidden or not, or its checksums tell;
and the next save finishes or undoes what has been left half-way.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from contextlib import suppress
from pathlib import Path

from megalr.checkpoint.folders import candidates, look_at
from megalr.checkpoint.manifest import LATEST, MANIFEST, missing_or_cut, read_manifest
from megalr.disk import sync, write_and_sync
from megalr.errors import UserError

# What is in a checkpoint's folder, and what NFS makes of a file that is deleted while another process has it open.
OWN_NAMES = re.compile(r"rank-\d+\.safetensors|manifest\.json(\.part)?|\.nfs\w+")


def unfinished(directory: Path, tag: str) -> Path:
    """Where a checkpoint is written."""
    return directory / f".{tag}.part"


def publish(directory: Path, tag: str) -> Path:
    """Give a written checkpoint its name, and make it the latest."""
    place, old, new = directory / tag, _replaced(directory, tag), directory / f".{LATEST}.part"
    write_and_sync(new, tag)  # before all else: nothing of what follows needs room on the disk
    if place.exists():
        _remove(old)
        os.rename(place, old)
    os.rename(unfinished(directory, tag), place)
    sync(directory)
    os.replace(new, directory / LATEST)
    sync(directory)
    _remove(old)
    return place


def abandon(directory: Path, tag: str) -> None:
    """Undo a save that has failed, as far as it came: what it would have replaced is back, and its room free."""
    place, old = directory / tag, _replaced(directory, tag)
    with suppress(OSError):  # there is an error already, which this one must not hide
        if (old / MANIFEST).is_file() and not place.exists():
            os.rename(old, place)
    _remove(unfinished(directory, tag))
    with suppress(OSError):
        (directory / f".{LATEST}.part").unlink(missing_ok=True)


def tidy(directory: Path) -> None:
    """Finish or undo what interrupted saves and deletions have left, while no other save is under way.

    A written checkpoint that only lacks its name gets it: the run may have gone on from it, and what it was to replace
    may be hidden as well. What is hidden and not this module's stays, and so does what another version has written.
    """
    for part in _hidden(directory, ".part"):
        if _is_whole(part):
            publish(directory, _tag_of(part))
        else:
            _remove(part)
    for old in _hidden(directory, ".old"):
        place = directory / _tag_of(old)
        if not place.exists() and _is_whole(old):
            os.rename(old, place)
        else:
            _remove(old)


def prune(directory: Path, keep: int) -> None:
    """Remove the oldest checkpoints, so that ``keep`` are left.

    One whose files are not there in full does not count, lest it displace one that can be loaded; it is removed when it
    is older than those that stay. Checksums are not looked at, which would take as long as loading: the newest, which
    has just been written, stays in any case. So does a link, whose checkpoint is somebody else's.
    """
    left = 0
    for manifest in candidates(directory):
        if left < max(1, keep):
            left += _is_whole(manifest.folder)
            continue
        if manifest.folder.is_symlink():
            continue
        hidden = _replaced(directory, manifest.folder.name)
        _remove(hidden)
        os.rename(manifest.folder, hidden)
        _remove(hidden)


def written_now(directory: Path) -> int:
    """The time for a new checkpoint: nanoseconds, later than all that are there even if the clock was put back."""
    return max([time.time_ns(), *(manifest.order + 1 for manifest in candidates(directory))])


def is_own(folder: Path) -> bool:
    """Whether a folder is a checkpoint or what is left of one, which a save may replace."""
    try:
        names = set(os.listdir(folder))
    except OSError:  # nobody knows
        return False
    return (all(map(OWN_NAMES.fullmatch, names)) and names != {MANIFEST}) or _is_read(folder)


def not_ours(directory: Path) -> list[str]:
    """Names in a directory of checkpoints that no save has written.

    Raises:
        OSError: it cannot be read.
    """
    ours = (LATEST, f".{LATEST}.part")
    names = [name for name in sorted(os.listdir(directory)) if name not in ours and not name.startswith(".nfs")]
    places = {name: directory / name for name in names}
    return [
        name for name, place in places.items() if place.is_symlink() or not os.path.isdir(place) or not is_own(place)
    ]


def find(directory: Path, tag: str) -> Path:
    """A checkpoint's folder, hidden if its publication was interrupted."""
    places = (directory / tag, unfinished(directory, tag), _replaced(directory, tag))
    return next((place for place in places if os.path.isfile(place / MANIFEST)), places[0])


def _replaced(directory: Path, tag: str) -> Path:
    """Where a checkpoint waits for its deletion."""
    return directory / f".{tag}.old"


def _hidden(directory: Path, suffix: str) -> list[Path]:
    found = [f for f in sorted(directory.glob(f".*{suffix}")) if f.is_dir() and not f.is_symlink() and is_own(f)]
    return [f for f in found if not (look_at(f).manifest is None and not look_at(f).is_damaged)]


def _tag_of(hidden: Path) -> str:
    return hidden.stem[1:]


def _is_read(folder: Path) -> bool:
    """Whether there is a manifest of a checkpoint."""
    try:
        read_manifest(folder)
    except (UserError, OSError):
        return False
    return True


def _is_whole(folder: Path) -> bool:
    """Whether there is a manifest, and every file that it names has its size."""
    try:
        return not missing_or_cut(read_manifest(folder))
    except (UserError, OSError):
        return False


def _remove(folder: Path) -> None:
    """Remove a folder; without its manifest it is no checkpoint any more, however far the deletion comes."""
    with suppress(OSError):
        if folder.is_symlink():  # to a checkpoint elsewhere, which is not to be touched
            folder.unlink()
            return
        (folder / MANIFEST).unlink()
    shutil.rmtree(folder, ignore_errors=True)
