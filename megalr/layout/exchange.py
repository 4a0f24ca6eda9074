"""Moving data: fragments to the owners of whole matrices, and what the owners computed back to the fragments.

Both directions are all-to-all messages planned from the layout alone, so every rank knows what to send and what comes
without asking. What already lies where it is needed is copied, not sent; when a round needs no message at all, no
collective is called. All ranks of the group must call with the same units in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from megalr.layout.layout import Fragment, Layout
from megalr.layout.placement import Unit
from megalr.timing import Stopwatch

BUCKET_BYTES = 2**28
# One tensor a flat buffer: masters, or first moments, or ... of this rank.
Field = Sequence[Tensor]


# What becomes of the elements that come back for a fragment of this rank: (fragment, values).
Write = Callable[[Fragment, Tensor], None]
_Read = Callable[[int, Fragment], Tensor]
_Put = Callable[[int, Fragment, Tensor], None]
# Waits for messages and writes them; holds them as long as it lives.
_Arrive = Callable[[], None]


@dataclass(frozen=True)
class _Plan:
    """What one rank does in one round, by fragments.

    Attributes:
        local: what this rank both has and needs.
        outgoing, incoming: what travels, ordered by the other rank; both ends keep the units' order inside that.
        out_counts, in_counts: elements to and from each rank.
        travelling: elements that travel between any two ranks.
    """

    local: list[Fragment]
    outgoing: list[Fragment]
    incoming: list[Fragment]
    out_counts: list[int]
    in_counts: list[int]
    travelling: int


class Gathering:
    """A gather under way."""

    def __init__(self, whole: dict[str, list[Tensor]], layout: Layout, arrive: _Arrive) -> None:
        self._whole, self._layout, self._arrive = whole, layout, arrive

    def wait(self) -> dict[str, list[Tensor]]:
        """What :meth:`Exchange.gather` returns, once; nothing of it is held here any longer."""
        self._arrive()
        whole, self._whole, self._arrive = self._whole, {}, _nothing
        return {name: [self._layout.whole(name, flat) for flat in tensors] for name, tensors in whole.items()}


class Scattering:
    """A scatter under way."""

    def __init__(self, arrive: _Arrive) -> None:
        self._arrive = arrive

    def wait(self) -> None:
        """Write what has come, and let go of it."""
        self._arrive()
        self._arrive = _nothing


class Exchange:
    """Gathers whole parameters at their owners and scatters them back, over one data-parallel group.

    Each has a form that only starts the communication, so that computation can go on beside it.

    Attributes:
        layout: what lies where.
        rank: this process's rank in the group.
        bucket_bytes: maximum temporary memory of whole-matrix work.
        bytes_sent: bytes this rank has sent to others since the start.
        bytes_moved: bytes all ranks together have sent to others since the start.
        stopwatch: measures, as "exchange", how long this rank waits for messages; None: nobody does.
    """

    def __init__(
        self,
        layout: Layout,
        rank: int,
        group: dist.ProcessGroup | None,
        *,
        device: torch.device | None = None,
        replicas: dist.ProcessGroup | None = None,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        """
        Args:
            layout: what lies where.
            rank: this process's rank in ``group``.
            group: the data-parallel group; may be None when the layout has one rank.
            device: where messages live: the accelerator under NCCL. None: where the first field lies.
            replicas: see :class:`~megalr.layout.shard.Shard`.
            bucket_bytes: maximum temporary memory of whole-matrix work; see :class:`~megalr.layout.rounds.Rounds`.
        """
        self.layout = layout
        self.rank = rank
        self.bucket_bytes = bucket_bytes
        self.bytes_sent = self.bytes_moved = 0
        self.stopwatch: Stopwatch | None = None
        self._group = group
        self._replicas = replicas
        self._device = device
        self._plans: dict[tuple[str, tuple[Unit, ...]], _Plan] = {}

    def gather(self, units: Sequence[Unit], fields: Sequence[Field]) -> dict[str, list[Tensor]]:
        """Whole tensors of the units that this rank owns.

        Args:
            units: parameters and owners, the same on every rank.
            fields: flat buffers to read, e.g. ``[masters, first_moments]``.

        Returns:
            For each parameter owned here, one new tensor of the parameter's shape a field.
        """
        return self.start_gather(units, fields).wait()

    def start_gather(self, units: Sequence[Unit], fields: Sequence[Field]) -> Gathering:
        """:meth:`gather` up to the point where one would wait; the fields may change afterwards."""
        like = fields[0][0]
        whole = {
            name: [torch.empty(self.layout.numel(name), dtype=f[0].dtype, device=f[0].device) for f in fields]
            for name, owner in _owned(units)
            if owner == self.rank
        }

        def read(k: int, fragment: Fragment) -> Tensor:
            return run_of(fields[k], fragment)

        def write(k: int, fragment: Fragment, value: Tensor) -> None:
            whole[fragment.name][k][fragment.start : fragment.start + fragment.length].copy_(value)

        arrive = self._start(self._gather_plan(tuple(units)), len(fields), read, write, like)
        return Gathering(whole, self.layout, arrive)

    def scatter(self, units: Sequence[Unit], values: Mapping[str, Sequence[Tensor]], fields: Sequence[Field]) -> None:
        """Write whole tensors back into every rank's fragments, in place.

        Args:
            units: as in :meth:`gather`.
            values: for each parameter owned here, one tensor of the parameter's shape a field.
            fields: flat buffers to write.
        """

        self.start_scatter(units, values, [copy_into(field) for field in fields], like=fields[0][0]).wait()

    def start_scatter(
        self,
        units: Sequence[Unit],
        values: Mapping[str, Sequence[Tensor]],
        writes: Sequence[Write],
        *,
        like: Tensor,
    ) -> Scattering:
        """:meth:`scatter` up to the point where one would wait.

        Args:
            units, values: as in :meth:`scatter`; the values may be dropped afterwards.
            writes: for each value of a parameter, what to do with the part that belongs to a fragment of this rank.
            like: any tensor of the values' dtype on the device that messages start from.
        """

        flat = {name: [self.layout.flat(name, value) for value in of_item] for name, of_item in values.items()}

        def read(k: int, fragment: Fragment) -> Tensor:
            return flat[fragment.name][k][fragment.start : fragment.start + fragment.length]

        def write(k: int, fragment: Fragment, value: Tensor) -> None:
            writes[k](fragment, value)

        return Scattering(self._start(self._scatter_plan(tuple(units)), len(writes), read, write, like))

    def broadcast(self, tensor: Tensor, owner: int) -> None:
        """Make the owner's tensor everyone's, in place."""
        if self.layout.world_size == 1:
            return
        size = self._send(tensor, self._group, owner) * (self.layout.world_size - 1)
        self.bytes_moved += size
        self.bytes_sent += size if owner == self.rank else 0

    def broadcast_replicas(self, tensor: Tensor) -> Tensor:
        """Make the first replica's tensor that of all ranks which do the same work, in place; returned as well."""
        if self._replicas is not None:
            self._send(tensor, self._replicas, 0)
        return tensor

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of all ranks' tensors, in place, on every rank; returned as well."""
        world_size = self.layout.world_size
        if world_size == 1:
            return tensor
        message = tensor if self._device is None else tensor.to(self._device)
        with self._waiting():
            dist.all_reduce(message, group=self._group)
        if message is not tensor:
            tensor.copy_(message)
        size = message.numel() * message.element_size()
        self.bytes_moved += 2 * size * (world_size - 1)  # as a ring does it: a reduce-scatter and an all-gather
        self.bytes_sent += 2 * size * (world_size - 1) // world_size
        return tensor

    def sum_all(self, tensor: Tensor) -> Tensor:
        """:meth:`sum` over this group and over the replicas, each of which has seen other data."""
        self.sum(tensor)
        if self._replicas is not None:
            message = tensor if self._device is None else tensor.to(self._device)
            with self._waiting():
                dist.all_reduce(message, group=self._replicas)
            if message is not tensor:
                tensor.copy_(message)
        return tensor

    def everywhere(self, name: str, field: Field) -> Tensor:
        """A parameter's whole tensor, new, on every rank."""
        whole = torch.zeros(self.layout.numel(name), dtype=field[0].dtype, device=field[0].device)
        replicated = self.layout.is_replicated(name)
        for fragment in self.layout.on(name, self.rank):
            if replicated or fragment.copy == 0:
                whole[fragment.start : fragment.start + fragment.length] = run_of(field, fragment)
        if not replicated:
            self.sum(whole)
        return self.layout.whole(name, whole)

    def vote(self, mine: bool, number: int = 0) -> tuple[bool, bool]:
        """Whether it is so on every rank, replicas included, and whether all have the same number. Collective."""
        if not self._groups():
            return mine, True
        vote = torch.tensor([int(mine), number, -number], device=self._device)
        for group in self._groups():
            dist.all_reduce(vote, op=dist.ReduceOp.MIN, group=group)
        all_true, least, most = vote.tolist()
        return bool(all_true), least == -most

    def range_of(self, numbers: Tensor) -> tuple[list[int], list[int]]:
        """The least and the largest of each number that ranks have. Collective, for several ranks."""
        extremes = torch.stack([numbers, -numbers]).to(self._device or numbers.device)
        dist.all_reduce(extremes, op=dist.ReduceOp.MIN, group=self._group)
        return extremes[0].tolist(), (-extremes[1]).tolist()

    def said(self, words: str) -> list[str]:
        """Every rank's words, replicas included; the same list on all."""
        found = [words]
        for group in self._groups():
            lists: list[list[str]] = [[]] * dist.get_world_size(group)
            dist.all_gather_object(lists, found, group=group)
            found = [each for one in lists for each in one]
        return found

    def _waiting(self) -> AbstractContextManager[None]:
        return nullcontext() if self.stopwatch is None else self.stopwatch.measure("exchange")

    def _groups(self) -> list[dist.ProcessGroup]:
        """Those in which this rank is not alone."""
        return [g for g in (self._group if self.layout.world_size > 1 else None, self._replicas) if g is not None]

    def _start(self, plan: _Plan, count: int, read: _Read, write: _Put, like: Tensor) -> _Arrive:
        """Copy what is local, send the rest in one all-to-all, for each of ``count`` fields.

        Returns what waits for the messages and writes them.
        """
        for fragment in plan.local:
            for k in range(count):
                write(k, fragment, read(k, fragment))
        if not plan.travelling:
            return _nothing
        device = self._device or like.device
        pieces = [read(k, fragment).to(device) for fragment in plan.outgoing for k in range(count)]
        send = torch.cat(pieces) if pieces else torch.empty(0, dtype=like.dtype, device=device)
        out_sizes, in_sizes = [n * count for n in plan.out_counts], [n * count for n in plan.in_counts]
        received = torch.empty(sum(in_sizes), dtype=send.dtype, device=device)
        work = dist.all_to_all_single(received, send, in_sizes, out_sizes, group=self._group, async_op=True)
        self.bytes_sent += send.numel() * send.element_size()
        self.bytes_moved += plan.travelling * count * send.element_size()

        def arrive(sent: Tensor = send) -> None:  # holds what is being sent until it has been
            with self._waiting():
                work.wait()
            position = 0
            for fragment in plan.incoming:
                for k in range(count):
                    write(k, fragment, received[position : position + fragment.length])
                    position += fragment.length

        return arrive

    def _send(self, tensor: Tensor, group: dist.ProcessGroup | None, source: int) -> int:
        """Broadcast in place; the bytes of one message."""
        message = tensor if self._device is None else tensor.to(self._device)
        with self._waiting():
            dist.broadcast(message, group=group, group_src=source)
        if message is not tensor:
            tensor.copy_(message)
        return message.numel() * message.element_size()

    def _gather_plan(self, units: tuple[Unit, ...]) -> _Plan:
        if ("gather", units) not in self._plans:
            moves = [(f, f.rank, owner) for name, owner in _owned(units) for f in self.layout.cover(name, owner)]
            self._plans["gather", units] = self._plan(moves)
        return self._plans["gather", units]

    def _scatter_plan(self, units: tuple[Unit, ...]) -> _Plan:
        if ("scatter", units) not in self._plans:
            moves = [(f, owner, f.rank) for name, owner in _owned(units) for f in self.layout.of(name)]
            self._plans["scatter", units] = self._plan(moves)
        return self._plans["scatter", units]

    def _plan(self, moves: list[tuple[Fragment, int, int]]) -> _Plan:
        """This rank's part of the moves (fragment, from rank, to rank)."""
        outgoing = sorted((m for m in moves if m[1] == self.rank != m[2]), key=lambda move: move[2])
        incoming = sorted((m for m in moves if m[2] == self.rank != m[1]), key=lambda move: move[1])
        out_counts, in_counts = [0] * self.layout.world_size, [0] * self.layout.world_size
        for fragment, _, target in outgoing:
            out_counts[target] += fragment.length
        for fragment, source, _ in incoming:
            in_counts[source] += fragment.length
        return _Plan(
            [fragment for fragment, source, target in moves if source == target == self.rank],
            [move[0] for move in outgoing],
            [move[0] for move in incoming],
            out_counts,
            in_counts,
            sum(fragment.length for fragment, source, target in moves if source != target),
        )


def _owned(units: Iterable[Unit]) -> list[tuple[str, int]]:
    """Every parameter with its owner."""
    return [(name, unit.owner) for unit in units for name in unit.names]


def _nothing() -> None:
    """What arrives where nothing travels."""


def copy_into(field: Field) -> Write:
    """Write what comes back into this rank's flat buffers."""
    return partial(_copy_into, field)


def _copy_into(field: Field, fragment: Fragment, value: Tensor) -> None:
    run_of(field, fragment).copy_(value)


def run_of(field: Field, fragment: Fragment) -> Tensor:
    """The elements of one of this rank's fragments, as a view of its flat buffer."""
    return field[fragment.buffer][fragment.offset : fragment.offset + fragment.length]


def write(flat: Tensor, field: Field, fragments: Sequence[Fragment]) -> None:
    """Put a parameter's values, in their order, where this rank's fragments of it are."""
    for fragment in fragments:
        run_of(field, fragment).copy_(flat[fragment.start : fragment.start + fragment.length])
