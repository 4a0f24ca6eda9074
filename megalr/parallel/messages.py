"""What the layers' tensor-parallel ranks send each other: sums, of which autograd sees one direction each."""

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
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _summed(grad, ctx.group), None


class Sum(torch.autograd.Function):
    """The sum over the group; its gradient is the same on all ranks, and every rank's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _summed(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class SharedLatents:
    """x @ A.T of layers that get the same x, such as q, k and v, in one product and one message.

    The first layer that is called computes all of them; the others take theirs when they are called with the same x.
    Under ZeRO-3 every layer works on its own, since a layer's parameters are there only while it is called itself.
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
        self._waiting: dict[int, Tensor] = {}

    def of(self, layer: LowRankLinear, x: Tensor) -> Tensor:
        """The latent of one layer, (..., r)."""
        if hasattr(layer.A, "ds_id"):
            return self._latents(x, [layer.A])[0]
        if x is not self._x or id(layer) not in self._waiting:
            self._x = x
            self._waiting = dict(zip(self._factors, self._latents(x, list(self._factors.values())), strict=True))
        mine = self._waiting.pop(id(layer))
        if not self._waiting:
            self._x = None  # not to be held
        return mine

    def _latents(self, x: Tensor, factors: Sequence[Tensor]) -> Sequence[Tensor]:
        stacked = functional.linear(x, factors[0] if len(factors) == 1 else torch.cat(list(factors)))
        shared: Tensor = SumGradient.apply(stacked, self._group)
        return shared.split([len(a) for a in factors], dim=-1)


class SharedInput:
    """x of layers that get the same one, whose gradients are added up before they are summed over the ranks."""

    def __init__(self, members: int, group: dist.ProcessGroup) -> None:
        """
        Args:
            members: how many layers there are.
            group: the tensor-parallel ranks.
        """
        self._members = members
        self._group = group
        self._served: set[int] = set()
        self._held: tuple[Tensor, Tensor] | None = None

    def of(self, layer: nn.Module, x: Tensor) -> Tensor:
        """x itself, for one of the layers."""
        if self._held is None or x is not self._held[0] or id(layer) in self._served:
            self._held, self._served = (x, SumGradient.apply(x, self._group)), set()
        shared = self._held[1]
        self._served.add(id(layer))
        if len(self._served) == self._members:
            self._held = None  # not to be held
        return shared


def _summed(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = x.contiguous().clone()
    dist.all_reduce(total, group=group)
    return total
