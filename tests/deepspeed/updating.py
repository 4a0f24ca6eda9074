"""What the ranks run in the tests of the updater's communication: hand-made shards, a rule that leaves a record."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

import megalr
from megalr.layout.exchange import Exchange
from megalr.layout.planned import planned_layout
from megalr.layout.shard import Shard
from megalr.memory.formulas import RankBytes, expected_bytes, measured_bytes
from megalr.optim.events.refactorization import pair_units, refactorize_pairs
from megalr.optim.matrices import MatrixUpdater
from megalr.rules.base import Basis, Rule, Shape, State
from megalr.rules.registry import RULES
from tests.deepspeed.rule_training import batches, engine_of, rule_configuration
from tests.deepspeed.training import run_steps

BYTES = 4
SEVEN = {f"p{i}": (31 + i, 40) for i in range(7)}
PAIR = ((48, 8), (8, 40))  # B and A of a low-rank layer
EVEN = {f"p{i}": (64, 64) for i in range(24)}


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that were made inside and are still alive, and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        old = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and id(tensor.untyped_storage()) not in old:
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: Any) -> None:
        if storage in self._seen:
            return
        self._seen.add(storage)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, size)

    def _forget(self, size: int) -> None:
        self.now -= size


@dataclass(frozen=True, kw_only=True)
class Recorded(Rule):
    """The gradient itself, and an entry in ``events``."""

    name: ClassVar[str] = "recorded"
    events: list[Any] = field(default_factory=list)

    def init_state(self, shape: Shape, device: torch.device | str = "cpu") -> State:
        return {"count": 0}

    def update(self, grad: Tensor, state: State, basis: Basis | None) -> Tensor:
        self.events.append("rule")
        return grad.clone()

    def state_numel(self, shape: Shape) -> int:
        return shape[0] * shape[1]

    def flops(self, shape: Shape) -> float:
        return float(shape[0] * shape[1])


def shard_of(shapes: dict[str, tuple[int, ...]], stage: int) -> tuple[Shard, list[Tensor]]:
    """This rank's part of random masters, and of gradients."""
    layout = planned_layout([shapes], stage=stage, world_size=dist.get_world_size())
    rank = dist.get_rank()
    size = max((f.offset + f.length for f in layout.fragments if f.rank == rank), default=0)
    masters = [torch.randn(size)]
    return Shard(layout, masters, masters, rank, dist.group.WORLD, lambda buffer: None), [torch.randn(size)]


def memory(shapes: dict[str, tuple[int, ...]], stage: int, bucket_bytes: int) -> tuple[int, int, int]:
    """The most that an update had of temporary memory, what was left of it, and the rounds."""
    shard, gradients = shard_of(shapes, stage)
    updater = MatrixUpdater(dict.fromkeys(shapes, Recorded()), shard, device=None, bucket_bytes=bucket_bytes, seed=0)
    update = partial(updater.update, [0], gradients, lr=0.1, weight_decay=0.0, updates=0)
    with mock.patch.object(updater.exchange, "start_gather", wraps=updater.exchange.start_gather) as gathers:
        peak, left = _measured(update)
    return peak, left, gathers.call_count


def _measured(function: Callable[[], Any]) -> tuple[int, int]:
    """The most that a function has of temporary memory, and what is left.

    gloo's own thread lets go of a message at some moment after it has come, so copies travel that do not count: what
    does is what our code holds.
    """
    original = dist.all_to_all_single

    def send_copies(received: Tensor, sent: Tensor, *sizes: Any, **options: Any) -> SimpleNamespace:
        with _disable_current_modes():
            came = torch.empty_like(received)
            work = original(came, sent.clone(), *sizes, **options)

        def wait() -> None:
            work.wait()
            received.copy_(came)

        return SimpleNamespace(wait=wait)

    with mock.patch.object(dist, "all_to_all_single", send_copies), LiveBytes() as counting:
        function()
    return counting.peak, counting.now


def refactorization_memory(bucket_bytes: int, *, transport: bool) -> tuple[int, int]:
    """The most that gathering, a replaced decomposition and scattering took of temporary memory, and what was left."""
    pairs = [(f"l{i}.B", f"l{i}.A") for i in range(12)]
    shapes = {name: shape for pair in pairs for name, shape in zip(pair, PAIR, strict=True)}
    shard, moments = shard_of(shapes, 3)
    units = pair_units(pairs, shard.layout)
    exchange = Exchange(shard.layout, shard.rank, shard.group, bucket_bytes=bucket_bytes)
    fields = [shard.buffers, moments, moments] if transport else [shard.buffers]

    def all_done(left: list[Tensor], *_: Any) -> SimpleNamespace:
        statuses = [0] * len(left)  # the result must not hold the factors
        return SimpleNamespace(tolist=lambda: statuses)

    with mock.patch("megalr.optim.events.refactorization.refactorize_", all_done):
        return _measured(partial(refactorize_pairs, units, exchange, fields))


def events(stage: int, bucket_bytes: int) -> tuple[list[Any], list[Any], int]:
    """What happened in one update, in order.

    Returns:
        "rule" or "start" (of communication); sizes to and from each rank of each message; whole matrices owned.
    """
    shard, gradients = shard_of(SEVEN, stage)
    rule = Recorded()
    updater = MatrixUpdater(dict.fromkeys(SEVEN, rule), shard, device=None, bucket_bytes=bucket_bytes, seed=0)
    sizes: list[Any] = []
    original = dist.all_to_all_single

    def spied(received: Tensor, sent: Tensor, in_sizes: list[int], out_sizes: list[int], **options: Any) -> Any:
        rule.events.append("start")
        sizes.append((out_sizes, in_sizes))
        return original(received, sent, in_sizes, out_sizes, **options)

    with mock.patch.object(dist, "all_to_all_single", spied):
        updater.update([0], gradients, lr=0.1, weight_decay=0.0, updates=0)
    layout = shard.layout
    whole = [m for m in updater.matrices if m.owner == shard.rank and layout.is_whole_on(m.name, shard.rank)]
    return rule.events, sizes, len(whole)


def state_bytes(stage: int, optimizer: str, **params: Any) -> tuple[int, int, str, RankBytes, RankBytes]:
    """After the second update of a small LLaMA, and the first micro-batch of the third.

    Returns:
        Bytes of the rule's state on this rank; what the rule says of all; the routing table; measured and computed.
    """
    shape = {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=61))
    if getattr(RULES[optimizer], "rank", 1) > 1:
        params = {"rank": 16, **params}
    config = rule_configuration(stage, optimizer, accumulation=2)
    config["optimizer"] = {"type": optimizer, "params": params}
    engine = megalr.initialize(model=model, config=config)[0]
    for ids in batches(1) * 5:
        rows = ids[:2]
        engine.backward(engine(input_ids=rows, labels=rows).loss)
        engine.step()
    base = engine.basic_optimizer
    kept = [t for state in base.matrix_states.values() for t in state.values() if isinstance(t, Tensor)]
    counted = (
        sum(t.numel() * t.element_size() for t in kept),
        sum(m.rule.state_bytes(m.shape) for m in base.matrices.matrices),
        base.routing_table(),
        measured_bytes(engine),
        expected_bytes(engine),
    )
    engine.destroy()
    return counted


@dataclass(frozen=True)
class Traffic:
    """Bytes moved by an engine's update, and what the layout says of it."""

    moved: int
    away_from_owners: int  # elements of cut matrices that do not lie on their owner
    elements: int  # of all matrices
    planned: bool  # the engine's layout is what its shapes let expect


def traffic(stage: int) -> Traffic:
    """Of one update of the odd model."""
    engine = engine_of(rule_configuration(stage, "Muon"))
    optimizer = engine.basic_optimizer
    run_steps(engine, batches(1))
    before = optimizer.bytes_moved
    run_steps(engine, batches(1))
    moved = optimizer.bytes_moved - before
    shard, updater = optimizer.prepare(), optimizer.matrices
    layout = shard.layout.matrices([n for g in optimizer.groups if g.rule for n in g.parameters])
    away = sum(f.length for m in updater.matrices for f in layout.cover(m.name, m.owner) if f.rank != m.owner)
    shapes = [{n: tuple(shard.layout.shapes[n]) for n in g.parameters} for g in optimizer.groups]
    planned = planned_layout(shapes, stage=stage, world_size=dist.get_world_size())
    same = planned.shapes == shard.layout.shapes and sorted(planned.fragments) == sorted(shard.layout.fragments)
    engine.destroy()
    return Traffic(moved, away, sum(map(layout.numel, layout.shapes)), same)


def largest_matrix(shapes: dict[str, tuple[int, ...]]) -> int:
    """Bytes."""
    return BYTES * max(map(math.prod, shapes.values()))
