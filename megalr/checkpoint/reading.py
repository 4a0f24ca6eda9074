"""A checkpoint's tensors without an engine."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from safetensors import safe_open
from torch import Tensor

from megalr.checkpoint.format import BY_NAME, piece_name
from megalr.checkpoint.manifest import Manifest


def read_tensor(manifest: Manifest, key: str) -> Tensor:
    """One logical tensor, whole, on the CPU; see :func:`megalr.layout.rectangles.folded` for its shape.

    Raises:
        KeyError: the checkpoint has no such tensor.
    """
    found = manifest.tensors[key]
    whole = torch.empty(found["shape"], dtype=BY_NAME[found["dtype"]])
    for offsets, sizes, file, *_ in found["pieces"]:
        with safe_open(manifest.folder / file, framework="pt") as opened:
            where = tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))
            whole[where] = opened.get_tensor(piece_name(found.get("stored", key), offsets))
    return whole


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
