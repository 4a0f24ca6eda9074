"""A run's state that is known from the count of updates, written and read as checkpoints without an engine."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from megalr.checkpoint.manifest import Manifest
from megalr.checkpoint.reading import read_tensor
from megalr.checkpoint.saving import write_entries
from megalr.layout.rectangles import Entry, Piece
from megalr.version import __version__

PRIME = 8191
SHARED = "frozen/bias"  # all ranks have all of it, and one writes it
LIGHT = 8  # columns
FILE = "rank-00000.safetensors"


def shapes(columns: int = LIGHT) -> dict[str, tuple[int, ...]]:
    """Of all tensors; the more columns, the longer a save takes."""
    return {
        "weights/embedding.weight": (50, columns),
        "weights/layers.0.weight": (37, columns),
        "exp_avg/layers.0.weight": (37, columns),
        "weights/norm.weight": (19,),
        SHARED: (11,),
    }


def value(key: str, updates: int, columns: int = LIGHT) -> Tensor:
    """One tensor after so many updates: no two updates and no two keys have the same."""
    shape, dtype = shapes(columns)[key], torch.bfloat16 if key == SHARED else torch.float32
    place = list(shapes()).index(key)
    return ((torch.arange(math.prod(shape)) * (place + 3) + updates * 101) % PRIME).to(dtype).view(shape)


def entries(updates: int | None, rank: int, world_size: int, columns: int = LIGHT) -> dict[str, Entry]:
    """What a rank has after so many updates: some rows; zeros, to be read into, if None."""
    found = {}
    for key, shape in shapes(columns).items():
        whole = value(key, 0 if updates is None else updates, columns)
        begin, end = rank * shape[0] // world_size, (rank + 1) * shape[0] // world_size
        begin, end = (0, shape[0]) if key == SHARED else (begin, end)
        piece = whole[begin:end].contiguous() if updates is not None else torch.zeros_like(whole[begin:end])
        found[key] = Entry(shape, whole.dtype, (Piece((begin,) + (0,) * (len(shape) - 1), piece),))
    return found


def document(updates: int) -> dict[str, Any]:
    """What a manifest says beside the tensors."""
    return {
        "numbers": {"optimizer": {"updates": updates, "rule": {"rule": "adamw"}, "layers": {}}, "names": {}},
        "client": {},
        "layout": {"stage": 0, "processes": 1, "tensor_parallel": 1, "dtype": "float32"},
        "config": {},
        "model": None,
        "versions": {"megalr": __version__},
    }


def content(updates: int) -> dict[str, Any]:
    """The same of a whole manifest, of no tensors."""
    return {**document(updates), "written": updates, "files": {}, "tensors": {}}


def write(directory: Path, updates: int, tag: str | None = None, keep: int | None = None) -> Path:
    """Write a checkpoint from this process alone."""
    tag = tag or f"step{updates}"
    write_entries(directory, tag, document(updates), entries(updates, 0, 1), {}, keep=keep, asynchronous=False)
    return directory / tag


def write_model(directory: Path, model: Any, section: Mapping[str, Any]) -> Path:
    """Write a checkpoint of a model of transformers that has been trained with a parametrization."""
    described = json.loads(model.config.to_json_string(use_diff=False)) | {"architectures": [type(model).__name__]}
    found = {
        f"{'weights' if p.requires_grad else 'frozen'}/{name}": Entry.of(p.detach())
        for name, p in model.named_parameters()
    }
    said = document(1) | {"config": {"megalr": {"parametrization": section}}, "model": described}
    write_entries(directory, "one", said, found, {}, keep=None, asynchronous=False)
    return directory / "one"


def wrong(manifest: Manifest, columns: int = LIGHT) -> list[str]:
    """Keys of a checkpoint whose values are not in every bit those of its count of updates."""
    expected = shapes(columns)
    differing = [k for k in expected if not torch.equal(read_tensor(manifest, k), value(k, manifest.updates, columns))]
    return differing + sorted(expected.keys() ^ manifest.tensors.keys())


def check_only_text_and_tensors(folder: Path) -> None:
    """Every byte below a folder is JSON's, a name's, or belongs to a tensor of safetensors: none is a pickle's."""
    for path in (path for path in folder.rglob("*") if path.is_file()):
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.name == "latest":
            assert (folder / path.read_text().strip()).is_dir()
        else:
            data = path.read_bytes()
            length = int.from_bytes(data[:8], "little")
            header = json.loads(data[8 : 8 + length])
            spans = sorted(each["data_offsets"] for each in header.values())
            assert spans[0][0] == 0
            assert all(before[1] == after[0] for before, after in zip(spans, spans[1:], strict=False))
            assert 8 + length + spans[-1][1] == len(data)
            with safe_open(path, framework="pt") as opened:
                assert sorted(opened.keys()) == sorted(header)


def names(folder: Path) -> list[str]:
    """What is in a folder."""
    return sorted(path.name for path in folder.iterdir())


def flip(path: Path, position: int) -> None:
    """Change one bit of a file's byte."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << (position % 8)
    path.write_bytes(data)
