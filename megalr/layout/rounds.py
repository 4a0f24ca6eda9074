"""Whole-matrix work on cut parameters, round by round: gather at the owners, compute there, send the results back.

The next round's gathering and the last round's scattering are under way while a round is computed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from megalr.layout.exchange import Exchange, Field, Write
from megalr.layout.layout import Layout
from megalr.layout.placement import Unit

# While one round is computed there may be, each as large as a round: its tensors, one after the other replaced by its
# results; the next round's whole, incoming and outgoing tensors; the last round's incoming and outgoing results.
ROUNDS_IN_MEMORY = 6

# Computes on the units of a round that this rank owns: (units, whole tensors by name, one a field) -> results by name.
# It may empty the dictionary of tensors as it goes.
Compute = Callable[[Sequence[Unit], dict[str, list[Tensor]]], Mapping[str, Sequence[Tensor]]]


class Rounds:
    """Whole-matrix work on some units; the first round travels as soon as this is made."""

    def __init__(self, exchange: Exchange, units: Sequence[Unit], fields: Sequence[Field]) -> None:
        """
        Args:
            exchange: what moves the data; its ``bucket_bytes`` is what may be in memory at once, unless one unit alone
                takes more.
            units: parameters and owners, the same on every rank.
            fields: flat buffers to read, e.g. ``[masters, first_moments]``.
        """
        self._exchange, self._fields = exchange, fields
        numel = exchange.bucket_bytes // (ROUNDS_IN_MEMORY * fields[0][0].element_size() * len(fields))
        self._rounds = split_into_rounds(units, exchange.layout, max(1, numel))
        self._gathering = exchange.start_gather(self._rounds[0], fields) if self._rounds else None

    def run(self, compute: Compute, writes: Sequence[Write] = (), *, like: Tensor | None = None) -> None:
        """Compute on all units. Collective.

        Args:
            compute: called once a round, also where this rank owns nothing of it.
            writes: for each result of a parameter, what to do with the part that belongs to a fragment of this rank;
                without any, nothing is sent back.
            like: any tensor of the results' dtype on the device that messages start from; None: the fields' first.
        """
        exchange, scattering = self._exchange, None
        for index, units in enumerate(self._rounds):
            assert self._gathering is not None
            whole = self._gathering.wait()
            if index + 1 < len(self._rounds):
                self._gathering = exchange.start_gather(self._rounds[index + 1], self._fields)
            results = compute([unit for unit in units if unit.owner == exchange.rank], whole)
            if scattering is not None:
                scattering.wait()
            if writes:
                source = self._fields[0][0] if like is None else like
                scattering = exchange.start_scatter(units, results, writes, like=source)
            del whole, results  # not to be held through the next round
        if scattering is not None:
            scattering.wait()


def split_into_rounds(units: Sequence[Unit], layout: Layout, limit: int) -> list[list[Unit]]:
    """Rounds that give no owner more than ``limit`` elements at once, and every owner something while it has any.

    A unit that is larger than the limit is its owner's only one in a round. Each round keeps the order of ``units``.
    """
    waiting: dict[int, deque[int]] = {}
    for index, unit in enumerate(units):
        waiting.setdefault(unit.owner, deque()).append(index)
    rounds: list[list[Unit]] = []
    while waiting:
        current: list[int] = []
        for owner in list(waiting):
            load = 0
            queue = waiting[owner]
            while queue:
                size = sum(layout.numel(name) for name in units[queue[0]].names)
                if load and load + size > limit:
                    break
                load += size
                current.append(queue.popleft())
            if not queue:
                del waiting[owner]
        rounds.append([units[index] for index in sorted(current)])
    return rounds


def gather_at(owner: int, exchange: Exchange, field: Field) -> dict[str, Tensor] | None:
    """All parameters as whole tensors on the CPU of one rank, by name; None on the others. Collective."""
    whole: dict[str, Tensor] = {}

    def keep(units: Sequence[Unit], tensors: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
        whole.update({name: value.cpu() for name, (value,) in tensors.items()})
        return {}

    Rounds(exchange, [Unit((name,), owner) for name in exchange.layout.shapes], [field]).run(keep)
    return whole if exchange.rank == owner else None
