"""A checkpoint's tensors without an engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megalr.checkpoint.format import BY_NAME, piece_name
from megalr.checkpoint.inputs import open_inside
from megalr.checkpoint.manifest import Manifest, check_same
from megalr.errors import UserError


def read_tensor(manifest: Manifest, key: str) -> Tensor:
    """One logical tensor, whole, on the CPU; see :func:`megalr.layout.rectangles.folded` for its shape.

    Raises:
        KeyError: the checkpoint has no such tensor.
        UserError: a file does not have what the manifest says.
    """
    found = manifest.tensors[key]
    whole = torch.empty(found["shape"], dtype=BY_NAME[found["dtype"]])
    for offsets, sizes, file, *_ in found["pieces"]:
        with open_tensors(manifest, file) as opened:
            where = tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))
            name = piece_name(found.get("stored", key), offsets)
            piece = opened.get_tensor(name)
            if (list(piece.shape), piece.dtype) != (sizes, whole.dtype):
                raise SafetensorError(f"{name} has another shape or dtype")
            whole[where] = piece
    return whole


@contextmanager
def open_tensors(manifest: Manifest, file: str) -> Iterator[Any]:
    """A checkpoint's safetensors file, opened by name because the library does not take an open file.

    What is read is of the manifest's save if :func:`~megalr.checkpoint.manifest.check_same` says so afterwards.

    Raises:
        ReplacedError: it cannot be read, as another save has taken the place of this one.
        UserError: it cannot be read, or what is read there is not there.
    """
    path = manifest.folder / file
    try:
        open_inside(manifest.folder, file).close()
        with safe_open(path, framework="pt") as opened:
            yield opened
    except (OSError, SafetensorError) as error:
        check_same(manifest)
        raise UserError(f"{path} cannot be read: {error}. Check the checkpoint with `verify`") from error


def outlines(manifest: Manifest) -> dict[str, Tensor]:
    """Shapes and dtypes of all logical tensors, as tensors on the meta device, by key."""
    return {
        key: torch.empty(found["shape"], dtype=BY_NAME[found["dtype"]], device="meta")
        for key, found in manifest.tensors.items()
    }


def keys_of(manifest: Manifest, *kinds: str) -> Iterator[tuple[str, str]]:
    """Keys and names of the tensors of some kinds: "weights", "exp_avg", "rule", "frozen", "buffers", ..."""
    for key in manifest.tensors:
        kind, _, name = key.partition("/")
        if kind in kinds:
            yield key, name
