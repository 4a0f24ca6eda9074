"""A checkpoint's folder: the manifest that says what has to be in it, and whether it is.

``DIR/<tag>/manifest.json`` is written last of all, when every file that it names is on the disk, into a folder whose
name begins with a dot; then the folder is renamed, and then ``DIR/latest`` names it. A deletion hides the folder first
and removes its manifest before all else. So whatever was interrupted, a folder with a manifest is whole, hidden or not,
or its checksums tell; and the next save finishes or undoes what has been left half-way. No file is a pickle: tensors
are safetensors, the rest is JSON.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalr.checkpoint.format import itemsize
from megalr.errors import UserError

VERSION = 1
MANIFEST = "manifest.json"
LATEST = "latest"
READ_AT_ONCE = 1 << 24  # bytes
READERS = 8  # threads
# What is in a checkpoint's folder, and what NFS makes of a file that is deleted while another process has it open.
OWN_NAMES = re.compile(r"rank-\d+\.safetensors|manifest\.json|\.nfs\w+")


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself.

    Attributes:
        folder: where it is.
        content: "numbers", "client", "layout", "config", "model", "versions", "written"; and of the data "files", by
            name {"bytes", "header"}, and "tensors", by key {"shape", "dtype", "pieces"}, a piece being
            [offsets, sizes, file, first byte in the file, checksum].
    """

    folder: Path
    content: Mapping[str, Any]

    @property
    def updates(self) -> int:
        """Made before it was written."""
        return int(self.content["numbers"]["optimizer"]["updates"])

    @property
    def order(self) -> int:
        """Of two manifests the newer one has the greater: it was written later, whatever updates it has."""
        return int(self.content["written"])

    @property
    def tensors(self) -> Mapping[str, Any]:
        """By key."""
        tensors: Mapping[str, Any] = self.content["tensors"]
        return tensors

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the logical tensors, by key."""
        return {key: tuple(found["shape"]) for key, found in self.tensors.items()}

    @property
    def size(self) -> int:
        """Bytes of all files but the manifest's own."""
        return sum(file["bytes"] for file in self.content["files"].values())


def write_manifest(folder: Path, content: Mapping[str, Any]) -> None:
    """Write it, with its own checksum, to the disk."""
    content = json.loads(json.dumps(content))  # as it will be read: JSON makes one of keys that look alike
    outer = {"version": VERSION, "checksum": _checksum(content), "content": content}
    write_and_sync(folder / MANIFEST, json.dumps(outer))


def read_manifest(folder: Path) -> Manifest:
    """Read it, and make sure that it is as it was written.

    Raises:
        UserError: there is none, it is damaged, or it is of another version.
    """
    path = folder / MANIFEST
    try:
        outer = json.loads(path.read_text(encoding="utf-8"))
        version = outer["version"]
        if version == VERSION:
            if _checksum(outer["content"]) != outer["checksum"]:
                raise ValueError("its checksum does not match")
            return Manifest(folder, outer["content"])
    except FileNotFoundError:
        raise UserError(f"{path} is missing: the checkpoint was never finished, or is no megalr checkpoint") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: {error}. Load another checkpoint") from error
    raise UserError(
        f"{path} is of version {version}, and this megalr reads version {VERSION}: load the checkpoint with the megalr "
        "that wrote it"
    )


def read_whole(folder: Path) -> Manifest:
    """The same, and make sure that all data is as it was written.

    Raises:
        UserError: for every file that is not; see :func:`problems`.
    """
    manifest = read_manifest(folder)
    wrong = problems(manifest)
    if wrong:
        raise UserError("\n  ".join([f"{folder} is damaged:", *wrong]))
    return manifest


def missing_or_cut(manifest: Manifest) -> list[str]:
    """Files that are not there or have another size, which is seen without reading them."""
    found = []
    for name, expected in manifest.content["files"].items():
        path = manifest.folder / name
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            found.append(f"{name} is missing")
        elif size != expected["bytes"]:
            found.append(f"{name} has {size:,} bytes instead of {expected['bytes']:,}")
    return found


def problems(manifest: Manifest, names: Iterable[str] | None = None) -> list[str]:
    """What is wrong with a checkpoint's files: each missing, cut short, too long or changed, and which tensor it hits.

    Args:
        manifest: of the checkpoint.
        names: of the files to look at; None for all.
    """
    pieces: dict[str, list[tuple[int, int, int, str]]] = {name: [] for name in manifest.content["files"]}
    for key, tensor in manifest.tensors.items():
        for _, sizes, file, begin, checksum in tensor["pieces"]:
            pieces[file].append((begin, math.prod(sizes) * itemsize(tensor["dtype"]), checksum, key))
    chosen = list(pieces if names is None else names)
    with ThreadPoolExecutor(READERS) as pool:
        return [line for found in pool.map(lambda name: _check(manifest, name, pieces[name]), chosen) for line in found]


def candidates(directory: Path) -> tuple[list[Manifest], list[str]]:
    """The checkpoints in a folder, newest first, their data not yet looked at; and what is none, and why.

    Args:
        directory: what :func:`megalr.save_checkpoint` was given.
    """
    found, refused = [], []
    for folder in sorted(directory.iterdir()) if directory.is_dir() else []:
        if not folder.is_dir() or (folder.name.startswith(".") and not (folder / MANIFEST).is_file()):
            continue  # an interrupted save or deletion leaves such a folder, and the next save removes it
        try:
            found.append(read_manifest(folder))
        except UserError as error:
            refused.append(str(error))
    return sorted(found, key=lambda manifest: manifest.order, reverse=True), refused


def newest_valid(directory: Path) -> tuple[Manifest | None, list[str]]:
    """The newest checkpoint whose data is as it was written, and what was passed over and why."""
    found, skipped = candidates(directory)
    for manifest in found:
        wrong = problems(manifest)
        if not wrong:
            return manifest, skipped
        skipped.append(wrong[0] + (f" (and {len(wrong) - 1} more files)" if wrong[1:] else ""))
    return None, skipped


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
    sync_folder(directory)
    os.replace(new, directory / LATEST)
    sync_folder(directory)
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
    may be hidden as well. What is hidden and not this module's stays.
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
    has just been written, stays in any case.
    """
    left = 0
    for manifest in candidates(directory)[0]:
        if left < max(1, keep):
            left += _is_whole(manifest.folder)
            continue
        hidden = _replaced(directory, manifest.folder.name)
        _remove(hidden)
        os.rename(manifest.folder, hidden)
        _remove(hidden)


def written_now(directory: Path) -> int:
    """The time for a new checkpoint: nanoseconds, later than all that are there even if the clock was put back."""
    return max([time.time_ns(), *(manifest.order + 1 for manifest in candidates(directory)[0])])


def is_own(folder: Path) -> bool:
    """Whether a folder is a checkpoint or what is left of one, which a save may replace."""
    return all(OWN_NAMES.fullmatch(path.name) for path in folder.iterdir()) or _is_read(folder)


def find(directory: Path, tag: str) -> Path:
    """A checkpoint's folder, hidden if its publication was interrupted."""
    places = (directory / tag, unfinished(directory, tag), _replaced(directory, tag))
    return next((place for place in places if (place / MANIFEST).is_file()), places[0])


def make_folder(folder: Path) -> None:
    """Make a folder and those that it is to be in, and wait until the disk has their names."""
    new = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for each in reversed(new):
        sync_folder(each.parent)


def write_and_sync(path: Path, text: str) -> None:
    """Write a file, and wait until the disk has it."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the disk has a folder's names."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _replaced(directory: Path, tag: str) -> Path:
    """Where a checkpoint waits for its deletion."""
    return directory / f".{tag}.old"


def _hidden(directory: Path, suffix: str) -> list[Path]:
    return [f for f in sorted(directory.glob(f".*{suffix}")) if f.is_dir() and is_own(f)]


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
        (folder / MANIFEST).unlink()
    shutil.rmtree(folder, ignore_errors=True)


def _check(manifest: Manifest, name: str, pieces: Sequence[tuple[int, int, int, str]]) -> list[str]:
    """What is wrong with one file; pieces: (first byte, bytes, checksum, key)."""
    path, expected = manifest.folder / name, manifest.content["files"][name]
    hit = f"it holds {_some(sorted({key for _, _, _, key in pieces}))}"
    try:
        size = path.stat().st_size
        if size != expected["bytes"]:
            return [f"{path} has {size:,} bytes instead of {expected['bytes']:,}; {hit}"]
        first = min((begin for begin, _, _, _ in pieces), default=size)
        with path.open("rb") as file:
            if _checksum_of(file.read, first) != expected["header"]:
                return [f"{path} has another header than the one that was written (another file's?); {hit}"]
            changed = []
            for begin, length, checksum, key in sorted(pieces):
                file.seek(begin)
                if _checksum_of(file.read, length) != checksum:
                    changed.append(key)
        return [f"{path} has other values of {_some(changed)} than were written"] if changed else []
    except FileNotFoundError:
        return [f"{path} is missing; {hit}"]
    except OSError as error:
        return [f"{path} cannot be read ({error}); {hit}"]


def _checksum(content: Any) -> int:
    return zlib.crc32(json.dumps(content).encode())  # as JSON gives it back, so does it write it


def _checksum_of(read: Callable[[int], bytes], length: int) -> int:
    value = 0
    while length > 0:
        block = read(min(length, READ_AT_ONCE))
        if not block:
            break
        value, length = zlib.crc32(block, value), length - len(block)
    return value


def _some(keys: Sequence[str]) -> str:
    """Parameters for a message: a few of them."""
    names = list(dict.fromkeys(key.partition("/")[2] for key in keys))
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
