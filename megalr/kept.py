"""Tensors that are computed once and used many times, such as tables."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import TypeVar

import torch
from torch import Tensor

Made = TypeVar("Made", Tensor, tuple[Tensor, Tensor])


def kept(make: Callable[..., Made]) -> Callable[..., Made]:
    """Keep the tensors that a function makes of the same arguments, for the life of the process.

    ``functools.cache`` would also keep what works only where it was made, and hand it to the next training step: the
    FakeTensor of a count of operations, the inference tensor of an evaluation, the memory of a compiled graph.

    Args:
        make: of hashable arguments without keywords, among them the device of what it makes, and the dtype if it has
            several. What it makes is never written to.
    """
    found: dict[tuple[Hashable, ...], Made] = {}

    @functools.wraps(make)
    def get(*key: Hashable) -> Made:
        if torch.compiler.is_compiling():
            return make(*key)
        with torch.inference_mode(False):
            if type(torch.empty(0, device="cpu")) is not Tensor:  # a mode such as FakeTensorMode makes something else
                return make(*key)
            if key not in found:
                found[key] = make(*key)
            return found[key]

    return get
