"""What the layers' tensor-parallel ranks send each other: sums, of which autograd sees one direction each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from megalr.generation import generation
from megalr.hosts import is_partitioned


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


class Gather(torch.autograd.Function):
    """What each rank has a part of, in the last dimension, whole; a rank's part gets its part of the gradient.

    What comes after does the same on all ranks, so that the gradient is the same on all.
    """

    @staticmethod
    def forward(ctx: Any, part: Tensor, widths: Sequence[int], group: dist.ProcessGroup) -> Tensor:
        rank = dist.get_rank(group)
        ctx.first, ctx.width = sum(widths[:rank]), widths[rank]
        mine = functional.pad(part, (0, max(widths) - ctx.width)).contiguous()  # all messages have one size
        parts = [torch.empty_like(mine) for _ in widths]
        dist.all_gather(parts, mine, group=group)
        return torch.cat([each[..., :width] for each, width in zip(parts, widths, strict=True)], dim=-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.narrow(-1, ctx.first, ctx.width), None, None


class StackedLatents:
    """x @ A.T of layers that get the same x, such as q, k and v, in one product and one message.

    The first layer that is called computes all of them; the others take theirs when they are called with the same x.
    Which layers belong together is a guess from their names. Where one is called with another x before all have taken
    theirs, as in cross-attention, or not before the next update, each works on its own from then on: as many bytes, in
    more messages.
    Under ZeRO-3 every layer works on its own, since a layer's parameters are there only while it is called itself.
    """

    def __init__(self, layers: Sequence[Any], group: dist.ProcessGroup) -> None:
        """
        Args:
            layers: column-parallel ones, each with a factor A, (r, n).
            group: the tensor-parallel ranks.
        """
        self._factors = {id(layer): layer.A for layer in layers}
        self._group = group
        self._apart = False
        self._x: Tensor | None = None
        self._made = 0  # the generation of what waits
        self._waiting: dict[int, Tensor] = {}

    def of(self, layer: Any, x: Tensor) -> Tensor:
        """The latent of one layer, (..., r)."""
        is_old = self._made != generation()
        if self._waiting and (is_old or x is not self._x or id(layer) not in self._waiting):
            self._apart, self._x, self._waiting = True, None, {}
        if self._apart or is_partitioned(layer.A):
            return self._latents(x, [layer.A])[0]
        if not self._waiting:
            self._x, self._made = x, generation()
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
    """x of layers that get the same one, whose gradients are added up before they are summed over the ranks.

    Which layers belong together is a guess from their names. Each x has a message of its own, however they come; where
    the layers of a group get several, as in cross-attention, the last one is held until the next pass.
    """

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
