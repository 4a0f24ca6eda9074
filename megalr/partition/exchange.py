"""Moving data: fragments to the owners of whole matrices, and what the owners computed back to the fragments.

Both directions are all-to-all messages planned from the layout alone, so every rank knows what to send and what comes
without asking. What already lies where it is needed is copied, not sent; when a round needs no message at all, no
collective is called. All ranks of the group must call with the same items in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megalr.partition.layout import Fragment, Layout
from megalr.partition.placement import Unit

# One tensor a flat buffer: masters, or first moments, or ... of this rank.
Field = Sequence[Tensor]


@dataclass(frozen=True)
class Item:
    """A parameter and its owner in one round of the exchange."""

    name: str
    owner: int


@dataclass(frozen=True)
class _Move:
    """One fragment's way from rank ``source`` to rank ``target``; one of the two is the owner."""

    fragment: Fragment
    source: int
    target: int


class Exchange:
    """Gathers whole parameters at their owners and scatters them back, over one data-parallel group.

    Attributes:
        layout: what lies where.
        rank: this process's rank in the group.
        bytes_sent: bytes this rank has sent to others since the start.
    """

    def __init__(
        self,
        layout: Layout,
        rank: int,
        group: dist.ProcessGroup | None,
        *,
        device: torch.device | None = None,
    ) -> None:
        """
        Args:
            layout: what lies where.
            rank: this process's rank in ``group``.
            group: the data-parallel group; may be None when the layout has one rank.
            device: where messages live: the accelerator under NCCL. None: where the first field lies.
        """
        self.layout = layout
        self.rank = rank
        self.bytes_sent = 0
        self._group = group
        self._device = device

    def gather(self, items: Sequence[Item], fields: Sequence[Field]) -> dict[str, list[Tensor]]:
        """Whole tensors of the items that this rank owns.

        Args:
            items: parameters and owners, the same on every rank.
            fields: flat buffers to read, e.g. ``[masters, first_moments]``.

        Returns:
            For each item owned here, one new tensor of the parameter's shape a field.
        """
        whole = {
            item.name: [torch.empty(self.layout.numel(item.name), dtype=f[0].dtype, device=f[0].device) for f in fields]
            for item in items
            if item.owner == self.rank
        }
        moves = [
            _Move(fragment, fragment.rank, item.owner)
            for item in items
            for fragment in self.layout.cover(item.name, item.owner)
        ]

        def read(k: int, fragment: Fragment) -> Tensor:
            return _flat(fields[k], fragment)

        def write(k: int, fragment: Fragment, value: Tensor) -> None:
            whole[fragment.name][k][fragment.start : fragment.start + fragment.length].copy_(value)

        self._run(moves, len(fields), read, write, fields[0][0])
        shapes = self.layout.shapes
        return {name: [tensor.view(shapes[name]) for tensor in tensors] for name, tensors in whole.items()}

    def scatter(self, items: Sequence[Item], values: Mapping[str, Sequence[Tensor]], fields: Sequence[Field]) -> None:
        """Write whole tensors back into every rank's fragments, in place.

        Args:
            items: as in :meth:`gather`.
            values: for each item owned here, one tensor of the parameter's shape a field.
            fields: flat buffers to write.
        """
        moves = [_Move(fragment, item.owner, fragment.rank) for item in items for fragment in self.layout.of(item.name)]

        def read(k: int, fragment: Fragment) -> Tensor:
            flat = values[fragment.name][k].reshape(-1)
            return flat[fragment.start : fragment.start + fragment.length]

        def write(k: int, fragment: Fragment, value: Tensor) -> None:
            _flat(fields[k], fragment).copy_(value)

        self._run(moves, len(fields), read, write, fields[0][0])

    def _run(self, moves, count, read, write, like: Tensor) -> None:  # type: ignore[no-untyped-def]
        """Carry out the moves for each of ``count`` fields: own ones by a copy, the others in one all-to-all."""
        for move in moves:
            if move.source == move.target == self.rank:
                for k in range(count):
                    write(k, move.fragment, read(k, move.fragment))
        travelling = [move for move in moves if move.source != move.target]
        if not travelling:
            return
        outgoing, incoming = self._sorted(travelling)
        device = self._device or like.device
        pieces = [read(k, m.fragment).to(device) for m in outgoing for k in range(count)]
        send = torch.cat(pieces) if pieces else torch.empty(0, dtype=like.dtype, device=device)
        out_sizes = self._sizes(outgoing, "target", count)
        in_sizes = self._sizes(incoming, "source", count)
        received = torch.empty(sum(in_sizes), dtype=send.dtype, device=device)
        dist.all_to_all_single(received, send, in_sizes, out_sizes, group=self._group)
        self.bytes_sent += send.numel() * send.element_size()
        position = 0
        for move in incoming:
            for k in range(count):
                write(k, move.fragment, received[position : position + move.fragment.length])
                position += move.fragment.length

    def _sorted(self, travelling: list[_Move]) -> tuple[list[_Move], list[_Move]]:
        """This rank's moves out and in, grouped by the other rank; inside a group both sides keep the plan's order."""
        outgoing = [move for move in travelling if move.source == self.rank]
        incoming = [move for move in travelling if move.target == self.rank]
        return sorted(outgoing, key=lambda m: m.target), sorted(incoming, key=lambda m: m.source)

    def _sizes(self, moves: list[_Move], peer: str, count: int) -> list[int]:
        sizes = [0] * self.layout.world_size
        for move in moves:
            sizes[getattr(move, peer)] += move.fragment.length * count
        return sizes


def buckets(units: Sequence[Unit], owners: Sequence[int], layout: Layout, limit: int) -> Iterator[list[int]]:
    """Indices of units, in order, in rounds that give no owner more than ``limit`` elements at once.

    A unit that is larger than the limit is its owner's only one in a round.
    """
    current: list[int] = []
    load: dict[int, int] = {}
    for index, (unit, owner) in enumerate(zip(units, owners, strict=True)):
        size = sum(layout.numel(name) for name in unit.names)
        if owner in load and load[owner] + size > limit:
            yield current
            current, load = [], {}
        current.append(index)
        load[owner] = load.get(owner, 0) + size
    if current:
        yield current


def _flat(field: Field, fragment: Fragment) -> Tensor:
    return field[fragment.buffer][fragment.offset : fragment.offset + fragment.length]
