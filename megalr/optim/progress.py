"""The update under way: which of its buffers have been stepped, and whether it is skipped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megalr.layout.exchange import Exchange
from megalr.layout.shard import Shard
from megalr.optim.arrivals import Arrivals
from megalr.optim.finiteness import all_finite

ParamGroups = Sequence[Mapping[str, Any]]


class Progress:
    """Counts the buffers that an engine steps one by one, or all at once.

    Attributes:
        skipping: whether the update under way, or the last one, is skipped.
        skip_asked: whether the next one is to be.
    """

    def __init__(self) -> None:
        self.skipping = self.skip_asked = False
        self._stepped: set[int] = set()
        self._began = False

    @property
    def is_between(self) -> bool:
        """Whether the next call is the first of an update."""
        return not self._stepped

    def is_dry_run(self, groups: ParamGroups, shard: Shard) -> bool:
        """Whether this is the call that DeepSpeed makes, with zero gradients, to have states created."""
        dry = shard.dry_run and not self._began and not any(grad.any() for grad in gradients_in(groups))
        self._began = self._began or not dry
        return dry

    def begin(
        self,
        groups: ParamGroups,
        shard: Shard,
        exchange: Exchange,
        arrivals: Arrivals,
        stages: dist.ProcessGroup | None = None,
    ) -> None:
        """Decide whether the update is skipped, if this is the first call of one. Collective.

        Args:
            groups: all of the optimizer's.
            shard: the masters.
            exchange: over their ranks.
            arrivals: of this update's gradients.
            stages: the ranks that have the other layers of the model, in a pipeline.

        Raises:
            UserError: ranks have used different parameters, where the engine needs them to use the same.
        """
        if not self.is_between:
            return
        self.skipping = self.skip_asked
        if not self.skipping and shard.unseen_gradients is not None:  # else the engine looks at gradients itself
            gradients = [grad for grad in gradients_in(groups) + shard.unseen_gradients() if grad.numel()]
            finite, same = exchange.vote(all_finite(gradients), arrivals.order if shard.ordered else 0)
            if not same:
                arrivals.raise_different(exchange)
            if shard.every_pass:
                arrivals.refuse_missing()
            self.skipping = not (finite if stages is None else _everywhere(finite, stages, shard))
        arrivals.forget()

    def add(self, buffers: Iterable[int]) -> None:
        """Some buffers have had their turn."""
        self._stepped.update(buffers)

    def ends(self, shard: Shard) -> bool:
        """Whether all buffers have had their turn; the next call is the next update's first."""
        if len(self._stepped) < len(shard.parameters):
            return False
        self._stepped.clear()
        return True

    def forget(self) -> None:
        """Forget an update that has begun."""
        self._stepped.clear()
        self.skipping, self._began = False, True


def gradients_in(groups: ParamGroups) -> list[Tensor]:
    """The gradients of parameter groups."""
    return [p.grad for group in groups for p in group["params"] if p.grad is not None]


def _everywhere(mine: bool, group: dist.ProcessGroup, shard: Shard) -> bool:
    """Whether it is so on every rank of the group. Collective."""
    vote = torch.tensor([int(mine)], device=shard.message_device())
    dist.all_reduce(vote, op=dist.ReduceOp.MIN, group=group)
    return bool(vote.item())
