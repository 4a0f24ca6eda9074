"""Training in a world of threads, with a save and a second engine on the way."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalr.layout.rectangles import Entry
from megalr.optim import state as states
from tests.equality import Case, batches, configuration, different, everything, run
from tests.world.engine import Engine
from tests.world.threads import world

ACCUMULATIONS = (1, 2)  # two tell as well as four whether something is done once for each micro-batch
Way = Literal["state_dict", "entries"]
WAYS: tuple[Way, ...] = ("state_dict", "entries")


@dataclass(frozen=True)
class Trained:
    """One rank's end of a run.

    Attributes:
        weights: as the model computes with them, whole; dense where the parametrization has dense weights. Rank 0
            has those of the masters where the model is of bf16.
        calls, updates, refreshes: what the optimizer has counted.
        lost: names of what differs in any bit after the run had gone on from what was saved.
    """

    weights: dict[str, Tensor]
    calls: int
    updates: int
    refreshes: int
    lost: list[str]


def train(
    case: Case, stage: int, size: int, accumulation: int = 1, *, resume: Way | None = None, **changes: Any
) -> list[Trained]:
    """Train a case from the start on ranks that are threads.

    Args:
        case: what to train.
        stage: of ZeRO.
        size: ranks.
        accumulation: micro-batches an update.
        resume: save after some updates in one of two ways; then a second engine goes on from that, too.
        **changes: to the JSON, section by section.
    """
    saved: dict[int, Any] = {}  # by rank; all ranks see it
    return world(size, _rank, case, case.model(), stage, accumulation, resume, saved, changes)


def alone(case: Case) -> dict[str, Tensor]:
    """What one process of ours gives."""
    (trained,) = train(case, 0, 1)
    return trained.weights


def engine_of(case: Case, dense: nn.Module, stage: int, accumulation: int = 1, **changes: Any) -> Engine:
    """A fresh engine with a copy of a model, which the other ranks copy, too."""
    looks = changes.pop("looks", None)
    return Engine(copy.deepcopy(dense), configuration(case, stage, accumulation, **changes), looks=looks)


def whole_weights(engine: Engine) -> dict[str, Tensor]:
    """What ``megalr.consolidated_state_dict`` has on rank 0, from this rank's weights; on rank 0 bf16's masters."""
    module = engine.module
    half = next(module.parameters()).dtype != torch.float32
    masters = engine.basic_optimizer.consolidate() if half else None
    state = {n: p for n, p in module.named_parameters() if p.requires_grad} | (masters or {})
    # Layers may share a frozen parameter, and each has its own name for it.
    state |= {n: p for n, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad}
    persistent = module.state_dict().keys()
    state |= {n: b for n, b in module.named_buffers() if n in persistent}
    return {name: held.detach().clone() for name, held in state.items()}


def _rank(
    case: Case,
    dense: nn.Module,
    stage: int,
    accumulation: int,
    resume: Way | None,
    saved: dict[int, Any],
    changes: dict[str, Any],
) -> Trained:
    data = batches(case.updates)
    engine = engine_of(case, dense, stage, accumulation, **changes)
    cut = case.updates // 2 + 1  # 7 of 12, and 11 of 20, when a ramp after a reset has begun
    run(engine, data[:cut])
    if resume is not None:
        saved[dist.get_rank()] = engine.state_dict() if resume == "state_dict" else _entries(engine)
        dist.barrier()
    run(engine, data[cut:])
    optimizer, lost = engine.basic_optimizer, []
    if resume is not None:
        second = engine_of(case, dense, stage, accumulation, **changes)
        run(second, data[:1])  # what is loaded replaces what was there
        if resume == "state_dict":
            second.load_state_dict(saved[dist.get_rank()])
        else:
            _load_entries(second, [saved[rank] for rank in range(dist.get_world_size())])
        run(second, data[cut:])
        lost = different(everything(engine), everything(second))
    state = whole_weights(engine)
    return Trained(case.weights(state), optimizer.rule_calls, optimizer.updates, optimizer.refreshes, lost)


def _entries(engine: Engine) -> tuple[dict[str, Any], dict[str, Entry], dict[str, Tensor]]:
    """What megalr's own checkpoints hold of this rank: numbers, rectangles, what is not trained; copies."""
    optimizer = engine.basic_optimizer
    numbers, entries = states.numbers_of(optimizer), states.entries_of(optimizer, once=True)
    return copy.deepcopy(numbers), copy.deepcopy(entries), copy.deepcopy(_untrained(engine.module))


def _load_entries(engine: Engine, saved: Sequence[tuple[dict[str, Any], dict[str, Entry], dict[str, Tensor]]]) -> None:
    """Take over what :func:`_entries` gave on all ranks."""
    optimizer = engine.basic_optimizer
    numbers = {**saved[0][0], "matrices": {k: v for of_rank, _, _ in saved for k, v in of_rank["matrices"].items()}}
    whole: dict[str, Tensor] = {}
    for _, entries, _ in saved:
        for key, entry in entries.items():
            target = whole.setdefault(key, torch.full(entry.shape, torch.nan).to(entry.dtype))
            for piece in entry.pieces:
                _part(target, piece.offsets, piece.data.shape).copy_(piece.data)
    assert states.check(optimizer, numbers, {key: each.to("meta") for key, each in whole.items()}) == ""
    states.make_room(optimizer, numbers, {key: value.to("meta") for key, value in whole.items()})
    states.set_rates(optimizer, numbers)
    entries = states.entries_of(optimizer, once=False)
    shard = optimizer.prepare()
    for key, entry in entries.items():
        for piece in entry.pieces:
            piece.data.copy_(_part(whole[key], piece.offsets, piece.data.shape))
    for name, held in _untrained(engine.module).items():
        held.copy_(saved[shard.rank][2][name])
    states.settle(optimizer, numbers)
    for buffer in range(len(shard.buffers)):
        shard.publish(buffer)
    engine.share_weights()


def _untrained(module: nn.Module) -> dict[str, Tensor]:
    frozen = {name: p.data for name, p in module.named_parameters() if not p.requires_grad}
    return frozen | {name: buffer.data for name, buffer in module.named_buffers()}


def _part(whole: Tensor, offsets: Sequence[int], shape: Sequence[int]) -> Tensor:
    for dim, (start, length) in enumerate(zip(offsets, shape, strict=True)):
        whole = whole.narrow(dim, start, length)
    return whole
