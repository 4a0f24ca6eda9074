"""What crosses the network between tensor-parallel ranks: activations as wide as the rank, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from megalr.layers.low_rank import LowRankLinear


class SumGradient(torch.autograd.Function):
    """The identity, whose gradient is summed over the group: each rank has used it for a part of the output."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:  # type: ignore[override]
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _summed(grad, ctx.group), None


class Sum(torch.autograd.Function):
    """The sum over the group; its gradient is the same on all ranks, and every rank's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:  # type: ignore[override]
        return _summed(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


class SharedLatents:
    """x @ A.T of layers that get the same x, such as q, k and v, in one product and one message.

    The first layer that is called computes all of them; the others take theirs when they are called with the same x.
    """

    def __init__(self, layers: Sequence[LowRankLinear], group: dist.ProcessGroup) -> None:
        """
        Args:
            layers: column-parallel ones.
            group: the tensor-parallel ranks.
        """
        self._factors = {id(layer): layer.A for layer in layers}
        self._group = group
        self._x: Tensor | None = None
        self._version = 0
        self._waiting: dict[int, Tensor] = {}

    @property
    def factors(self) -> list[nn.Parameter]:
        """A of all the layers."""
        return list(self._factors.values())

    def of(self, layer: nn.Module, x: Tensor) -> Tensor:
        """The latent of one layer, (..., r)."""
        mine = self._waiting.pop(id(layer), None) if x is self._x and x._version == self._version else None
        if mine is None:
            weights = self.factors
            stacked = functional.linear(x, torch.cat(weights) if len(weights) > 1 else weights[0])
            parts = SumGradient.apply(stacked, self._group).split([len(a) for a in weights], dim=-1)
            self._waiting = dict(zip(self._factors, parts, strict=True))
            self._x, self._version = x, x._version
            mine = self._waiting.pop(id(layer))
        if not self._waiting:
            self._x = None  # not to be held
        return mine


def _summed(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = x.contiguous().clone()
    dist.all_reduce(total, group=group)
    return total
