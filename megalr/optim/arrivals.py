"""In which order gradients have come: an engine that adds them up in that order needs the same one on all ranks."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from megalr.errors import UserError, some_of
from megalr.layout.exchange import Exchange

SHOWN = 4  # parameters in a message


class Arrivals:
    """Counts gradients as backward passes make them, by hooks on the parameters.

    ZeRO's stage 2 puts gradients into buckets as they come, and adds buckets up over the ranks. Where ranks use
    different parameters, as those of experts, or the same in another order, gradients of one are added to those of
    another, and nobody notices.
    """

    def __init__(self, groups: Sequence[Mapping[str, nn.Parameter]]) -> None:
        """
        Args:
            groups: all parameters by qualified name, before an engine has them; the same on every rank.
        """
        parameters = {name: p for group in groups for name, p in group.items() if p.requires_grad}
        self._names = list(parameters)
        self._counts = [0] * len(parameters)
        self._order = 0  # a checksum
        self._hooks = [
            p.register_post_accumulate_grad_hook(self._hook(index)) for index, p in enumerate(parameters.values())
        ]

    def stop(self) -> None:
        """Count no more: the engine takes gradients in any order."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self.forget()

    @property
    def order(self) -> int:
        """A checksum of the order since the last :meth:`forget`; below 2³²."""
        return self._order

    def forget(self) -> None:
        """The next gradient is the first of an update."""
        self._order = 0
        self._counts = [0] * len(self._counts)

    def raise_different(self, exchange: Exchange) -> None:
        """Name what ranks differ in. Collective, where ranks have another :attr:`order`.

        Raises:
            UserError: always, on all ranks.
        """
        least, most = exchange.range_of(torch.tensor(self._counts))
        names = [name for name, low, high in zip(self._names, least, most, strict=True) if low != high]
        what = f"used different parameters: {some_of(names)}" if names else "used parameters in another order"
        raise UserError(
            f"ranks have {what}. ZeRO's stage 2, and stage 1 with overlap_comm, add gradients up in the order in which "
            "they come, so those of different parameters have been mixed. Have every rank use all parameters (add "
            '0 * output of the experts that it leaves out), or write "zero_optimization": {"stage": 1} without '
            '"overlap_comm", {"stage": 0}, or {"stage": 3} with "leaf_module"'
        )

    def refuse_missing(self) -> None:
        """Raise a UserError where some backward pass of an update has not reached a parameter that another has."""
        passes = max(self._counts, default=0)
        seldom = [name for name, count in zip(self._names, self._counts, strict=True) if 0 < count < passes]
        if seldom:
            raise UserError(
                f"not every backward pass of an update has reached {some_of(seldom)}. ZeRO's stage 1 with "
                "overlap_comm, and stage 2 with the optimizer on the CPU, take gradients in the last one, and leave "
                'out those of parameters that it does not reach: write "overlap_comm": false at stage 1, or "stage": '
                "3 with offload_optimizer"
            )

    def _hook(self, index: int) -> object:
        mark = index.to_bytes(4, "little")

        def count(_: torch.Tensor) -> None:
            self._counts[index] += 1
            self._order = zlib.crc32(mark, self._order)

        return count
