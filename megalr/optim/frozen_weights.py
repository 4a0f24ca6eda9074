"""A frozen W0 takes over what was learned beside it: the sum in fp32, and how it becomes of the model's dtype."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megalr.errors import UserError
from megalr.hosts import copies, held, logical_shape
from megalr.hosts.tensor_parallel import own_part
from megalr.layout.exchange import Exchange
from megalr.layout.rectangles import Entry, folded, rectangles
from megalr.layout.shard import Shard
from megalr.seeding import generator

DROPPED_BITS = 16  # of fp32 that bf16 does not have


class FrozenWeights:
    """Adds to frozen weights, with one of three roundings.

    Attributes:
        remainders: by layer, for the rounding of that name: what bf16 has cut off this rank's share of the weight,
            itself in bf16; flat. The share is everything at stage 0, where every rank keeps everything.
    """

    def __init__(
        self, rounding: str, shard: Shard, exchange: Exchange, seed: int, remainders: dict[str, Tensor], trained: str
    ) -> None:
        """
        Args:
            rounding: "nearest", "stochastic" or "remainder"; a model in fp32 needs none.
            shard, exchange: of the masters.
            seed: key of stochastic rounding.
            remainders: what was loaded from a checkpoint, or empty; modified.
            trained: the last name of a parameter that each of the layers trains; where that is whole on every rank,
                every rank keeps everything.
        """
        self.remainders = remainders
        self._rounding, self._seed = rounding, seed
        self._shard, self._exchange, self._trained = shard, exchange, trained

    def take(self, name: str, weight: Tensor, learned: Tensor, *, decay: float, count: int) -> None:
        """W0 <- decay · W0 + learned, in place, wherever this rank holds a part of it; collective.

        Args:
            name: the layer's.
            weight: W0, frozen, perhaps cut by ZeRO-3.
            learned: (m, n), fp32, the same on every rank; modified.
            decay: what weight decay leaves.
            count: of earlier calls for this weight.

        Raises:
            UserError: stochastic rounding of a dtype other than bf16.
        """
        parts = copies(weight)
        delta = own_part(weight, learned).reshape(-1)
        if weight.dtype == torch.float32 or self._rounding == "nearest":
            for start, part in parts:
                part.copy_(torch.add(delta[start : start + part.numel()].to(part.device), part, alpha=decay))
        elif weight.dtype != torch.bfloat16:
            raise UserError(
                f'megalr.parametrization.merge_rounding is "{self._rounding}", which is for bf16, but the weights are '
                f'{weight.dtype}: write "nearest"'
            )
        elif self._rounding == "stochastic":
            noise = torch.randint(
                2**DROPPED_BITS, learned.shape, generator=generator(self._seed, name, "merge", count), dtype=torch.int32
            )
            noise = own_part(weight, noise).reshape(-1)
            for start, part in parts:
                run = slice(start, start + part.numel())
                total = torch.add(delta[run].to(part.device), part, alpha=decay)
                part.copy_(_stochastically(total, noise[run].to(part.device)))
        elif delta.numel() < learned.numel():
            raise UserError(
                'megalr.parametrization.merge_rounding is "remainder", which tensor-parallel ranks cannot share: write '
                '"nearest" or "stochastic"'
            )
        else:
            self._with_remainder(name, weight, delta, decay)

    def remainder(self, name: str, weight: Tensor) -> Entry:
        """This rank's share of a weight's remainder, by where it lies in the weight."""
        first, _ = self._share(name, weight, *held(weight)[0])
        shape, flat = logical_shape(weight), self.remainders[name]
        return Entry(folded(shape), flat.dtype, tuple(rectangles(shape, first, flat)))

    def make_room(self, name: str, weight: Tensor) -> None:
        """A remainder to be read into :meth:`remainder`'s pieces, if it is of any use: to go on with, or in fp32."""
        if self._rounding != "remainder" and weight.dtype != torch.float32:
            return
        start, own = held(weight)[0]
        first, last = self._share(name, weight, start, own)
        self.remainders[name] = torch.zeros(last - first, dtype=weight.dtype, device=own.device)

    def settle(self, name: str, weight: Tensor) -> None:
        """Where a remainder was read, and fp32 has room for it: add it to the weight."""
        if weight.dtype == torch.float32:
            _, own = held(weight)[0]
            own.add_(self.remainders.pop(name))

    def _with_remainder(self, name: str, weight: Tensor, delta: Tensor, decay: float) -> None:
        parts = copies(weight)
        start, own = parts[0]
        first, last = self._share(name, weight, start, own)
        share = own[first - start : last - start]
        total = torch.add(delta[first:last].to(share.device), share, alpha=decay)
        if name in self.remainders:
            total.add_(self.remainders[name].to(total.device), alpha=decay)
        rounded = total.to(weight.dtype)
        self.remainders[name] = total.sub_(rounded).to(weight.dtype)
        share.copy_(rounded)
        numel = math.prod(logical_shape(weight))
        if len(parts) > 1 or own.numel() > rounded.numel():
            # Every element comes from one rank, so that the sum is exact.
            whole = torch.zeros(numel, dtype=weight.dtype, device=share.device)
            whole[first:last] = rounded
            self._exchange.sum(whole)
            for begin, part in parts:
                part.copy_(whole[begin : begin + part.numel()])

    def _share(self, name: str, weight: Tensor, start: int, own: Tensor) -> tuple[int, int]:
        """The elements whose remainder this rank keeps; or, of a weight in fp32, those to which it is to be added."""
        layout, numel = self._shard.layout, math.prod(logical_shape(weight))
        everything = weight.dtype == torch.float32 or own.numel() < numel
        if everything or layout.is_replicated(f"{name}.{self._trained}"):
            return start, start + own.numel()
        chunk = math.ceil(numel / layout.world_size)
        return min(numel, self._shard.rank * chunk), min(numel, (self._shard.rank + 1) * chunk)


def _stochastically(values: Tensor, noise: Tensor) -> Tensor:
    """fp32 values that bf16 has, the one above or below each with odds by its distance; noise in [0, 2¹⁶)."""
    bits = values.view(torch.int32) + noise
    return bits.bitwise_and_(-(2**DROPPED_BITS)).view(torch.float32)
