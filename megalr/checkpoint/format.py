"""What the writer of a checkpoint's files and their readers have to agree on."""

from __future__ import annotations

from collections.abc import Sequence

import torch

# Names of safetensors.
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
BY_NAME = {name: dtype for dtype, name in DTYPES.items()}


def itemsize(dtype: str) -> int:
    """Bytes of one element, by safetensors' name of the dtype."""
    return BY_NAME[dtype].itemsize


def piece_name(key: str, offsets: Sequence[int]) -> str:
    """A rectangle's name in its file."""
    return f"{key}@{','.join(map(str, offsets))}"
