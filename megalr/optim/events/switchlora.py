"""SwitchLoRA's updates: AdamW on the factors' rows, each with a count of its own, and switches of rows for candidates.

Candidate number k of a factor is drawn from (seed, name, k) when its turn comes, on every rank. A row that was switched
out waits for its turn in CPU memory, at one rank; what an update needs of all layers travels in one sum.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from megalr.layers.base import Parametrization
from megalr.layers.low_rank import uniform_
from megalr.layers.switchlora import SwitchLoraConfig, SwitchLoraLinear
from megalr.layout.exchange import Exchange, Field
from megalr.layout.layout import Fragment
from megalr.layout.rectangles import Entry
from megalr.layout.shard import Shard
from megalr.ops import low_rank_adam
from megalr.optim.events.base import LayerEvents, Moments, Step
from megalr.optim.frozen_weights import FrozenWeights
from megalr.seeding import generator
from megalr.timing import span

OTHER = {"A": "B", "B": "A"}


@dataclass(frozen=True)
class _Switch:
    """Rows of one factor of one layer to be switched after an update.

    Attributes:
        factor: the qualified name.
        other: that of its counterpart.
        rows: which.
        numbers: of the switches, counted from the start of the run; the candidates' numbers too.
    """

    factor: str
    other: str
    rows: list[int]
    numbers: list[int]


class Switches(LayerEvents):
    """The switches of a model's SwitchLoRA layers."""

    parametrization: ClassVar[type[Parametrization]] = SwitchLoraConfig
    rewrites: ClassVar[str] = 'SwitchLoRA switches rows of both in turn; "type": "lora" switches none'
    group: ClassVar[str] = "factors"

    def __init__(self, layers: Mapping[str, Any], config: SwitchLoraConfig, seed: int) -> None:
        """
        Args:
            layers: the model's, by qualified name; those whose factors are not trained are left alone.
            config: the "parametrization" section.
            seed: key of candidates, of how many are switched, and of stochastic rounding.
        """
        self.remainders: dict[str, Tensor] = {}
        self._layers: dict[str, SwitchLoraLinear] = {n: layer for n, layer in layers.items() if layer.B.requires_grad}
        self._config, self._seed = config, seed
        # Switches of each factor so far, by layer; and by factor the update after which each row trains.
        self._made = dict.fromkeys(self._layers, 0)
        self._starts = {f"{n}.{f}": [0] * layer.rank for n, layer in self._layers.items() for f in layer.factors}
        # Rows that wait, by factor and number of the switch that put them there.
        self._waiting: dict[tuple[str, int], Tensor] = {}

    @property
    def made(self) -> int:
        return 2 * sum(self._made.values())

    def attach(self, shard: Shard, exchange: Exchange, moments: Moments) -> None:
        super().attach(shard, exchange, moments)
        self.frozen_weights = FrozenWeights(
            self._config.merge_rounding, shard, exchange, self._seed, self.remainders, "B"
        )

    def update(self, which: Sequence[int], gradients: Field, step: Step) -> None:
        """AdamW on all rows but those that rest."""
        fields = (self._shard.buffers, gradients, self._moments("exp_avg"), self._moments("exp_avg_sq"))
        runs: list[list[Tensor]] = [[] for _ in fields]
        steps: list[int] = []
        for name, starts in self._starts.items():
            for start, rows in _equal(starts):
                if start > step.updates:
                    continue
                for fragment, run in self._runs(name, rows):
                    if fragment.buffer in which:
                        steps.append(step.updates + 1 - start)
                        for found, field in zip(runs, fields, strict=True):
                            found.append(field[fragment.buffer][run])
        if steps:
            low_rank_adam(
                *runs, steps=steps, lr=step.lr, betas=step.betas, eps=step.eps, weight_decay=step.weight_decay
            )

    def end_update(self, updates: int) -> list[int]:
        switches = {name: self._plan(name, updates) for name in self._layers}
        pairs = [switch for both in switches.values() for switch in both]
        wanted = [(n, row) for s in pairs for n in (s.factor, s.other) for row in s.rows]
        queued = [(s.factor, k - self._queue(s.factor)) for s in pairs for k in s.numbers if k >= self._queue(s.factor)]
        changed: set[int] = set()
        with span("switch", shown=bool(pairs)):
            rows = self._rows(wanted, queued)
            for name, both in switches.items():
                if both:
                    self._switch(name, both, rows, updates)
                    self._made[name] += len(both[0].rows)
                    changed |= {f.buffer for s in both for f in self._shard.layout.of(s.factor)}
        return sorted(changed)

    def numbers(self) -> dict[str, Any]:
        return {
            "made": dict(self._made),
            "starts": {name: list(starts) for name, starts in self._starts.items()},
        }

    def load_numbers(self, numbers: Mapping[str, Any]) -> None:
        self._made = dict(numbers["made"])
        self._starts = {name: list(starts) for name, starts in numbers["starts"].items()}

    def merged(self) -> dict[str, Tensor]:
        return {name: layer.frozen_weight for name, layer in self._layers.items()}

    def entries(self) -> dict[str, Entry]:
        waiting = {f"waiting/{name} {number}": Entry.of(row) for (name, number), row in self._waiting.items()}
        return super().entries() | waiting

    def make_room(self, saved: Collection[str]) -> None:
        super().make_room(saved)
        self._waiting = {}
        for key in saved:
            kind, _, which = key.partition("/")
            name, _, number = which.rpartition(" ")
            if kind == "waiting" and self._keeps(name, int(number)):
                dtype = self._layers[name.rpartition(".")[0]].frozen_weight.dtype
                self._waiting[name, int(number)] = torch.empty(self._width(name), dtype=dtype)

    def _queue(self, factor: str) -> int:
        """How many candidates wait."""
        layer = self._layers[factor.rpartition(".")[0]]
        return min(layer.out_features, layer.in_features) - layer.rank

    def _plan(self, name: str, updates: int) -> list[_Switch]:
        """The switches of a layer after an update: as many rows of A as of B, half of the rows apart."""
        layer, made = self._layers[name], self._made[name]
        exact = self._config.switches(updates)
        chance = torch.rand((), generator=generator(self._seed, name, "switches", updates)).item()
        resting = sum(start > updates for start in self._starts[f"{name}.A"])
        # Rows that rest are not switched, and no candidate is back before its turn.
        room = min(layer.rank // 2 - resting, self._queue(f"{name}.A"))
        numbers = list(range(made, made + min(int(exact) + (chance < exact % 1), room)))
        return [
            _Switch(f"{name}.{f}", f"{name}.{OTHER[f]}", [(k + ahead) % layer.rank for k in numbers], numbers)
            for f, ahead in (("A", 0), ("B", layer.rank // 2))
            if numbers
        ]

    def _switch(
        self, name: str, both: Sequence[_Switch], rows: Mapping[tuple[str, int, bool], Tensor], updates: int
    ) -> None:
        """Switch rows of both factors of a layer; the rows of one are not counterparts of the other's."""
        layer = self._layers[name]
        masters, moments = self._shard.buffers, [self._moments(key) for key in ("exp_avg", "exp_avg_sq")]
        change = torch.zeros(layer.out_features, layer.in_features, device=masters[0].device)
        for switch in both:
            old = torch.stack([rows[switch.factor, row, False] for row in switch.rows])
            other = torch.stack([rows[switch.other, row, False] for row in switch.rows])
            new = torch.stack([self._candidate(layer, switch.factor, k, rows) for k in switch.numbers]).to(old)
            lost = (old - new) * layer.scale
            change += other.T @ lost if switch.factor.endswith(".A") else lost.T @ other
            for row, number, value in zip(switch.rows, switch.numbers, new, strict=True):
                for fragment, run in self._runs(switch.factor, range(row, row + 1)):
                    begin = fragment.start + run.start - fragment.offset - row * value.numel()
                    masters[fragment.buffer][run] = value[begin : begin + run.stop - run.start]
                for fragment, run in self._runs(switch.other, range(row, row + 1)):
                    for field in moments:
                        field[fragment.buffer][run] = 0
                self._starts[switch.other][row] = updates + self._config.frozen_steps
                if self._keeps(switch.factor, number):
                    # In the model's dtype: when its turn comes W0 takes the difference to what is kept.
                    kept = rows[switch.factor, row, False].to(layer.frozen_weight.dtype)
                    self._waiting[switch.factor, number] = kept.cpu().clone()
        self.frozen_weights.take(name, layer.frozen_weight, change, decay=1.0, count=updates)

    def _candidate(
        self, layer: SwitchLoraLinear, factor: str, number: int, rows: Mapping[tuple[str, int, bool], Tensor]
    ) -> Tensor:
        """What the switch with a number puts in: what an earlier one has taken out, or something new."""
        before = number - self._queue(factor)
        if before >= 0:
            return rows[factor, before, True]
        fresh = torch.empty(self._width(factor))
        uniform_(fresh, layer.bound(factor.rpartition(".")[2]), self._seed, factor, "candidate", number)
        return fresh

    def _rows(
        self, wanted: Sequence[tuple[str, int]], queued: Sequence[tuple[str, int]]
    ) -> dict[tuple[str, int, bool], Tensor]:
        """Rows of the factors, and rows that have waited, whole on every rank; in one message.

        Args:
            wanted: factors and rows.
            queued: factors and numbers of the switches that have put rows into the queue; this takes them out.

        Returns:
            Each by factor, row or number, and whether it has waited.
        """
        keys = [(*key, False) for key in dict.fromkeys(wanted)] + [(*key, True) for key in queued]
        sizes = [self._width(name) for name, _, _ in keys]
        masters = self._shard.buffers
        flat = torch.zeros(sum(sizes), device=masters[0].device)
        parts = dict(zip(keys, flat.split(sizes), strict=True))
        for (name, index, has_waited), part in parts.items():
            if not has_waited:
                for fragment, run in self._runs(name, range(index, index + 1)):
                    begin = fragment.start + run.start - fragment.offset - index * part.numel()
                    part[begin : begin + run.stop - run.start] = masters[fragment.buffer][run]
            elif (name, index) in self._waiting:
                part.copy_(self._waiting.pop((name, index)))
        if keys and not self._shard.layout.is_replicated(keys[0][0]):
            self._exchange.sum(flat)  # each element lies on one rank
        return parts

    def _keeps(self, factor: str, number: int) -> bool:
        """Whether this rank keeps a row that was switched out: in turn, or all of them where it keeps everything."""
        layout = self._shard.layout
        return layout.is_replicated(factor) or number % layout.world_size == self._shard.rank

    def _width(self, factor: str) -> int:
        return self._shard.layout.shapes[factor][1]

    def _runs(self, factor: str, rows: range) -> Iterator[tuple[Fragment, slice]]:
        """This rank's part of some rows of a factor: fragments, and places in their flat buffers."""
        width = self._width(factor)
        for f in self._shard.layout.on(factor, self._shard.rank):
            first, last = max(f.start, rows.start * width), min(f.start + f.length, rows.stop * width)
            if first < last:
                yield f, slice(f.offset + first - f.start, f.offset + last - f.start)


def _equal(starts: Sequence[int]) -> Iterator[tuple[int, range]]:
    """Runs of equal numbers, and where they are."""
    begin = 0
    for start, group in itertools.groupby(starts):
        end = begin + len(list(group))
        yield start, range(begin, end)
        begin = end
