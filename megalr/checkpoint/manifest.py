"""A checkpoint's manifest, which says what has to be in its folder, and whether it is.

No file is a pickle: tensors are safetensors, the rest is JSON.
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
from typing import Any

from megalr.checkpoint.format import itemsize
from megalr.disk import write_and_sync
from megalr.errors import UserError
from megalr.naming import without_wrappers

VERSION = 2
MANIFEST = "manifest.json"
LATEST = "latest"
READ_AT_ONCE = 1 << 24  # bytes
READERS = 8  # threads


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself.

    Attributes:
        folder: where it is.
        content: "numbers", "client", "layout", "config", "model", "versions", "written"; and of the data "files", by
            name {"bytes", "header"}, and "tensors", by key {"shape", "dtype", "pieces"}, a piece being
            [offsets, sizes, file, first byte in the file, checksum]; "stored" is the files' own key, if it is another.
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
    """Write it, with its own checksum, to the disk; under its name it is whole at every moment."""
    content = json.loads(json.dumps(content))  # as it will be read: JSON makes one of keys that look alike
    outer = {"version": VERSION, "checksum": _checksum(content), "content": content}
    part = folder / f"{MANIFEST}.part"
    write_and_sync(part, json.dumps(outer))
    os.replace(part, folder / MANIFEST)


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
            return Manifest(folder, _by_plain_names(outer["content"]))
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


def problems(manifest: Manifest) -> list[str]:
    """What is wrong with a checkpoint's files: each missing, cut, too long or changed one, and the tensors in it."""
    pieces: dict[str, list[tuple[int, int, int, str]]] = {name: [] for name in manifest.content["files"]}
    for key, tensor in manifest.tensors.items():
        for _, sizes, file, begin, checksum in tensor["pieces"]:
            pieces[file].append((begin, math.prod(sizes) * itemsize(tensor["dtype"]), checksum, key))
    with ThreadPoolExecutor(READERS) as pool:
        return [line for found in pool.map(lambda name: _check(manifest, name, pieces[name]), pieces) for line in found]


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


def _by_plain_names(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """Earlier versions wrote tensors of compiled models by the names that these have; the files still do."""
    tensors = {without_wrappers(key): {"stored": key, **found} for key, found in content.get("tensors", {}).items()}
    if tensors.keys() == content.get("tensors", {}).keys():
        return content
    numbers = json.loads(without_wrappers(json.dumps(content["numbers"])))
    return {**content, "numbers": numbers, "tensors": tensors}


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
