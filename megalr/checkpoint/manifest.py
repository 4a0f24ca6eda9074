"""A checkpoint's manifest, which says what has to be in its folder, and whether it is.

No file is a pickle: tensors are safetensors, the rest is JSON. Both are input, see :mod:`megalr.checkpoint.checking`.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megalr.checkpoint.checking import check_content
from megalr.checkpoint.format import itemsize, piece_name
from megalr.checkpoint.inputs import check_depth, open_inside, parse, read_inside
from megalr.disk import write_and_sync
from megalr.errors import UserError, printable, some_of
from megalr.naming import without_wrappers
from megalr.version import __version__

VERSION = 2
MANIFEST = "manifest.json"
LATEST = "latest"
READ_AT_ONCE = 1 << 24  # bytes
LARGEST_HEADER = 100_000_008  # bytes, with the eight of its length; safetensors reads no more
# Bytes of a manifest that are read at most, and more for each rank's file. A model of 80 layers takes a tenth of that.
LARGEST_MANIFEST = 1 << 26
LARGEST_PER_FILE = 1 << 22
RANK_FILES = "rank-*.safetensors"
READERS = 8  # threads
HEAD = 4096  # bytes of a manifest in which the checksum of the rest stands


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself.

    Attributes:
        folder: where it is.
        content: "numbers", "client", "layout", "config", "model", "versions", "written"; and of the data "files", by
            name {"bytes", "header"}, and "tensors", by key {"shape", "dtype", "pieces"}, a piece being
            [offsets, sizes, file, first byte in the file, checksum]; "stored" is the files' own key, if it is another.
        mark: what tells its file from that of every other save, see :func:`check_same`; None if it is of no file.
    """

    folder: Path
    content: Mapping[str, Any]
    mark: tuple[int, int] | None = None

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


class OtherVersionError(UserError):
    """A checkpoint is of a format that this megalr does not read; nothing says that it is damaged."""


class ReplacedError(UserError):
    """Another checkpoint has taken the place of the one that was being read; neither is damaged."""


def write_manifest(folder: Path, content: Mapping[str, Any]) -> None:
    """Write it, with its own checksum, to the disk; under its name it is whole at every moment.

    Raises:
        UserError: it would be too large or too deep to be read again.
    """
    content = json.loads(json.dumps(content))  # as it will be read: JSON makes one of keys that look alike
    text = json.dumps({"version": VERSION, "checksum": _checksum(content), "content": content})
    try:
        check_depth(content)
    except ValueError as error:
        raise UserError(f"of what is to be saved as JSON, {error}: make client_state simpler") from error
    if len(text) > (limit := _limit(len(content.get("files", ())))):
        raise UserError(
            f"what is to be saved as JSON has {len(text):,} bytes, of at most {limit:,}: keep large values of "
            "client_state in a file of their own"
        )
    part = folder / f"{MANIFEST}.part"
    write_and_sync(part, text)
    os.replace(part, folder / MANIFEST)


def read_manifest(folder: Path) -> Manifest:
    """Read it, and make sure that it is as it was written, and that it can be used, whoever wrote it.

    Raises:
        OtherVersionError: it is of another version.
        UserError: there is none, or it is damaged.
    """
    path = folder / MANIFEST
    try:
        limit = _limit(sum(1 for _ in folder.glob(RANK_FILES)))
        text = read_inside(folder, MANIFEST, limit)
        outer = parse(text)
        if not isinstance(outer, dict) or type(outer.get("version")) is not int:
            raise ValueError("it says no version")
        version = outer["version"]
        if version == VERSION:
            content = outer["content"]
            if _checksum(content) != outer["checksum"]:
                raise ValueError("its checksum does not match")
            check_content(content)
            return Manifest(folder, _by_plain_names(content), _mark(len(text), text))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: the checkpoint was never finished, or is no megalr checkpoint") from None
    except (OSError, ValueError, KeyError, RecursionError, MemoryError) as error:
        words = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{path} is damaged: {words}. Load another checkpoint") from error
    if version > VERSION:
        raise OtherVersionError(
            f"{path} was written by a newer megalr: it is of version {version}, and this megalr ({__version__}) reads "
            f"version {VERSION}. Update megalr to load it"
        )
    raise OtherVersionError(
        f"{path} is of version {version}, and this megalr reads version {VERSION}: load the checkpoint with the megalr "
        "that wrote it"
    )


def check_same(manifest: Manifest) -> None:
    """Make sure that all that was read from a checkpoint's files until now is of the save that its manifest is of.

    A save takes another's place as a whole folder, by a rename. While the folder has this manifest, its other files are
    those that were written with it. Nothing but names and bytes is compared, which are the same on every node.

    Args:
        manifest: as it was read before the files.

    Raises:
        ReplacedError: another save, or nothing, is there now.
    """
    if manifest.mark is None:
        return
    try:
        with open_inside(manifest.folder, MANIFEST) as file:
            now = _mark(os.fstat(file.fileno()).st_size, file.read(HEAD))
    except OSError as error:
        raise ReplacedError(
            f"{manifest.folder} was replaced or removed while it was read ({error.strerror or error}): run again"
        ) from error
    if now != manifest.mark:
        raise ReplacedError(f"{manifest.folder} was replaced by another save while it was read: run again")


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
    """Files that are not there or have another size, which is seen without reading them.

    Raises:
        ReplacedError: they are another save's by now.
    """
    found = []
    for name, expected in manifest.content["files"].items():
        try:
            with open_inside(manifest.folder, name) as file:
                size = os.fstat(file.fileno()).st_size
            if size != expected["bytes"]:
                found.append(f"{name} has {size:,} bytes instead of {expected['bytes']:,}")
        except FileNotFoundError:
            found.append(f"{name} is missing")
        except OSError as error:
            found.append(f"{name} cannot be read ({error.strerror or error})")
    if found:
        check_same(manifest)
    return found


def problems(manifest: Manifest) -> list[str]:
    """What is wrong with a checkpoint's files: each missing, cut, too long or changed one, and the tensors in it.

    Raises:
        ReplacedError: they are another save's by now.
    """
    pieces: dict[str, list[_Piece]] = {name: [] for name in manifest.content["files"]}
    for key, tensor in manifest.tensors.items():
        for offsets, sizes, file, begin, checksum in tensor["pieces"]:
            length = math.prod(sizes) * itemsize(tensor["dtype"])
            header = {"dtype": tensor["dtype"], "shape": sizes, "data_offsets": [begin, begin + length]}
            pieces[file].append(_Piece(begin, length, checksum, key, piece_name(key, offsets), header))
    with ThreadPoolExecutor(READERS) as pool:
        each = pool.map(lambda name: _check(manifest, name, pieces[name]), pieces)
        found = [line for lines in each for line in lines]
    if found:
        check_same(manifest)
    return found


class _Piece(NamedTuple):
    """Where a piece lies in its file, what of, and what the file's header has to say of it, places from its start."""

    begin: int
    length: int
    checksum: int
    key: str
    name: str
    header: dict[str, Any]


def _check(manifest: Manifest, name: str, pieces: Sequence[_Piece]) -> list[str]:
    """What is wrong with one file."""
    path, expected = manifest.folder / name, manifest.content["files"][name]
    hit = f"it holds {_some(sorted({piece.key for piece in pieces}))}"
    try:
        with open_inside(manifest.folder, name) as file:
            size = os.fstat(file.fileno()).st_size
            if size != expected["bytes"]:
                return [f"{path} has {size:,} bytes instead of {expected['bytes']:,}; {hit}"]
            first = min((piece.begin for piece in pieces), default=size)
            wrong = _wrong_header(file.read(min(first, LARGEST_HEADER + 1)), expected["header"], pieces)
            if wrong:
                return [f"{path} has {wrong}; {hit}"]
            changed = []
            for piece in sorted(pieces, key=lambda piece: piece.begin):
                file.seek(piece.begin)
                if _checksum_of(file.read, piece.length) != piece.checksum:
                    changed.append(piece.key)
        return [f"{path} has other values of {_some(changed)} than were written"] if changed else []
    except FileNotFoundError:
        return [f"{path} is missing; {hit}"]
    except OSError as error:
        return [f"{path} cannot be read ({error}); {hit}"]


def _by_plain_names(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """Earlier versions wrote tensors of compiled models by the names that these have; the files still do."""
    tensors = {without_wrappers(key): {"stored": key, **found} for key, found in content.get("tensors", {}).items()}
    if tensors.keys() == content.get("tensors", {}).keys():
        return content
    numbers = json.loads(without_wrappers(json.dumps(content["numbers"])))
    return {**content, "numbers": numbers, "tensors": tensors}


def _wrong_header(head: bytes, checksum: int, pieces: Sequence[_Piece]) -> str:
    """What is wrong with a file's header, its length before it; empty if nothing.

    Safetensors reads tensors where the header says that they are; the manifest's places are those that are checked.
    """
    if len(head) > LARGEST_HEADER:
        return f"a header of more than {LARGEST_HEADER:,} bytes"
    if zlib.crc32(head) != checksum:
        return "another header than the one that was written (another file's?)"
    expected = {}
    for piece in pieces:
        places = [place - len(head) for place in piece.header["data_offsets"]]
        expected[piece.name] = {**piece.header, "data_offsets": places}
    try:
        agrees = int.from_bytes(head[:8], "little") == len(head) - 8 and parse(head[8:]) == expected
    except ValueError:
        agrees = False
    return "" if agrees else "a header that says something else of its tensors than the manifest does"


def _limit(files: int) -> int:
    """The most bytes of a manifest that names so many files, each of which has a part of every tensor."""
    return LARGEST_MANIFEST + files * LARGEST_PER_FILE


def _mark(size: int, text: bytes) -> tuple[int, int]:
    """Of a manifest's file: its size, and the checksum of its head.

    The head holds the checksum of all that the manifest says, the time of the save included, of which a directory has
    no two alike.
    """
    return size, zlib.crc32(text[:HEAD])


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
    names = list(dict.fromkeys(printable(key.partition("/")[2]) for key in keys))
    return some_of(names)
