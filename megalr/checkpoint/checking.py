"""What a manifest has to say, and how that fits together: a manifest is input, and may be anybody's.

After this check nothing in it is of another type than its readers expect, no name leads out of the folder, and its
tensors have no more bytes than the files that it names: so nothing is allocated that the disk does not hold.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from itertools import chain
from types import NoneType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megalr.checkpoint.format import BY_NAME, itemsize
from megalr.checkpoint.inputs import check_depth

FILE_NAME = re.compile(r"rank-\d{5,9}\.safetensors")
LARGEST = 2**60  # of sizes and places, in bytes or elements; two of them can be added
MOST_DIMENSIONS = 4  # stored tensors have one or two

Counts = NDArray[np.int64]

# Types of what is read; an optional key ends in "?", a tuple is a choice, and a type alone stands for all values of an
# object. The rest of an object is free.
FORM: Mapping[str, Any] = {
    "numbers": {
        "optimizer": {"updates": int, "rule?": dict, "logical_rule?": dict, "layers?": dict, "lr?": dict},
        "names?": {str: str},
        "shapes?": {str: list},
        "matrices?": {str: dict},
        "engine?": {str: int},
    },
    "client": dict,
    "layout": {"stage": int, "processes": int, "tensor_parallel": int, "dtype": str},
    "config": {"optimizer?": (dict, NoneType), "megalr?": {"parametrization?": (dict, NoneType)}},
    "model": (dict, NoneType),
    "versions": {str: str},
    "written": int,
    "files": {str: {"bytes": int, "header": int}},
    "tensors": {str: {"shape": list, "dtype": str, "pieces": list}},
}
WORDS = {int: "a whole number", str: "a string", dict: "an object", list: "a list", NoneType: "null"}


def check_content(content: Any) -> None:
    """Make sure that a manifest's content can be used.

    Raises:
        ValueError: it cannot; a sentence about the first thing that is wrong.
    """
    _check_form(content, FORM, "")
    check_depth({**content, "tensors": {}})  # of which all is looked at below
    numbers = content["numbers"]
    for where, number in (("the number of updates", numbers["optimizer"]["updates"]), ("written", content["written"])):
        if number < 0:
            raise ValueError(f"{where} is negative")
    for name, shape in numbers.get("shapes", {}).items():
        if not _are_counts(shape):
            raise ValueError(f"{_short(name)} has the shape {_short(shape)}")
    _check_files(content["files"])
    _check_tensors(content["tensors"], content["files"])


def _check_form(value: Any, form: Any, where: str) -> None:
    if isinstance(form, Mapping):
        _check_type(value, dict, where)
        for key, inner in form.items():
            if key is str:
                for name, each in value.items():
                    _check_form(each, inner, f"{where}.{_short(name)}".lstrip("."))
            elif (name := key.rstrip("?")) in value:
                _check_form(value[name], inner, f"{where}.{name}".lstrip("."))
            elif name == key:
                raise ValueError(f"{where or 'it'} lacks {key}")
    else:
        _check_type(value, form, where)


def _check_type(value: Any, kinds: Any, where: str) -> None:
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    if type(value) not in kinds:  # true is no number
        raise ValueError(f"{where or 'it'} is {_short(value)} and not {' or '.join(WORDS[kind] for kind in kinds)}")


def _check_files(files: Mapping[str, Any]) -> None:
    for name, file in files.items():
        if not FILE_NAME.fullmatch(name):
            raise ValueError(f"{_short(name)} is no name of a checkpoint's file")
        if not 0 <= file["bytes"] <= LARGEST:
            raise ValueError(f"{name} cannot have {_short(file['bytes'])} bytes")


def _check_tensors(tensors: Mapping[str, Any], files: Mapping[str, Any]) -> None:
    """Each tensor's pieces cover it once, and the pieces of a file have as many bytes as its data.

    A checkpoint of many ranks has hundreds of thousands of pieces, so numpy looks at all of a tensor's at once. Nothing
    overflows: a tensor has no more bytes than all files, and no piece is larger than its tensor.
    """
    sizes = [file["bytes"] for file in files.values()]
    left, index = sum(sizes), {name: place for place, name in enumerate(files)}
    if left > LARGEST:
        raise ValueError("its files cannot be that large together")
    ends, filled = np.array(sizes, dtype=np.int64), np.zeros(len(files), dtype=np.int64)
    first = ends.copy()
    for key, tensor in tensors.items():
        shape, dtype, pieces = tensor["shape"], tensor["dtype"], tensor["pieces"]
        if len(tensor) > len(FORM["tensors"][str]):
            raise ValueError(f"{_short(key)} has more than shape, dtype and pieces")
        if dtype not in BY_NAME:
            raise ValueError(f"{_short(key)} has the dtype {_short(dtype)}")
        few = _are_counts(shape) and 0 < len(shape) <= MOST_DIMENSIONS
        if not few or math.prod(n + 1 for n in shape) > LARGEST:
            raise ValueError(f"{_short(key)} has the shape {_short(shape)}")
        left -= math.prod(shape) * itemsize(dtype)
        if left < 0:
            raise ValueError(f"{_short(key)} has the shape {_short(shape)}, for which its files are too small")
        places, rectangles = _arrays(key, pieces, len(shape), index)
        if (rectangles < 0).any() or (rectangles.sum(1) > shape).any() or (rectangles > shape).any():
            raise ValueError(f"{_short(key)} has pieces beyond its shape {_short(shape)}")
        lengths = rectangles[:, 1].prod(1) * itemsize(dtype)
        file, begin = places.T
        if (begin < 0).any() or (begin > LARGEST).any() or (begin + lengths > ends[file]).any():
            raise ValueError(f"{_short(key)} lies beyond the end of its file")
        if not _covers(shape, rectangles):
            raise ValueError(f"the pieces of {_short(key)} overlap, or leave something out")
        np.add.at(filled, file, lengths)
        np.minimum.at(first, file, begin)
    unfilled = (first + filled != ends).nonzero()[0]
    if len(unfilled):
        raise ValueError(f"its tensors do not fill {list(files)[unfilled[0]]}")


def _arrays(key: str, pieces: list[Any], dimensions: int, index: Mapping[str, int]) -> tuple[Counts, Counts]:
    """Of a tensor's pieces, each [offsets, sizes, file, first byte, checksum], numbers.

    Returns:
        (pieces, 2), the file's number and the first byte; (pieces, 2, dimensions), offsets and sizes.
    """
    if not all(type(piece) is list and len(piece) == 5 for piece in pieces):
        raise ValueError(f"a piece of {_short(key)} is not [offsets, sizes, file, first byte, checksum]")
    if not pieces:
        return np.zeros((0, 2), dtype=np.int64), np.zeros((0, 2, dimensions), dtype=np.int64)
    offsets, sizes, names, begins, checksums = zip(*pieces, strict=True)
    if not all(type(name) is str and name in index for name in names):
        raise ValueError(f"{_short(key)} is in a file of which it says nothing else")
    try:
        if set(map(type, chain(*offsets, *sizes, begins, checksums))) - {int}:  # numpy would convert
            raise TypeError
        places = np.array([[index[name] for name in names], begins], dtype=np.int64).T
        rectangles = np.stack([np.array(each, dtype=np.int64) for each in (offsets, sizes)], axis=1)
        if rectangles.shape != (len(pieces), 2, dimensions):
            raise ValueError
    except (ValueError, OverflowError, TypeError):
        raise ValueError(f"a piece of {_short(key)} has no place in {dimensions} whole numbers") from None
    return places, rectangles


def _covers(shape: list[int], rectangles: Counts) -> bool:
    """Whether rectangles cover a tensor's every element once, in a time that grows as their number does.

    A rectangle's corners, with signs that alternate, are the differences along all dimensions of the function that is
    one in it and zero outside. So the rectangles' functions add up to the tensor's just if their corners do.
    """
    whole = np.array([[[0] * len(shape), shape]])
    corners, signs = np.zeros((1 + len(rectangles), 1), dtype=np.int64), np.ones((1 + len(rectangles), 1))
    signs[0] = -1
    for size, (offset, extent) in zip(shape, np.concatenate([whole, rectangles]).transpose(2, 1, 0), strict=True):
        corners = corners * (size + 1) + offset[:, None]
        corners, signs = np.hstack([corners, corners + extent[:, None]]), np.hstack([signs, -signs])
    _, which = np.unique(corners.ravel(), return_inverse=True)
    return not np.bincount(which, signs.ravel()).any()


def _are_counts(numbers: Any) -> bool:
    return type(numbers) is list and all(type(each) is int and 0 <= each <= LARGEST for each in numbers)


def _short(value: Any) -> str:
    """A value for a message: in printable characters, and not many."""
    written = json.dumps(value)
    return written if len(written) <= 60 else f"{written[:57]}..."
