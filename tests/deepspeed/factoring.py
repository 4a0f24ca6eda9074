"""What the ranks run in the tests of layers with factors in the place of weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import megalr
from megalr.config.settings import MegalrConfig
from megalr.layers import densify
from tests.deepspeed import rule_training
from tests.deepspeed.training import configuration, lost_by_resuming, run_steps
from tests.odd_model import odd_model
from tests.references import parametrizations as references

STEPS = rule_training.STEPS
# What has plain layers on the odd model, and so its reference in tests/plain_factors.py.
CASES = {
    title: case
    for title, case in references.CASES.items()
    if case.model is odd_model and case.megalr.get("parametrization", {}).get("type") in references.PLAIN
}


def factored_configuration(stage: int, case: str, accumulation: int = 1, **changes: Any) -> dict[str, Any]:
    """A JSON for one of :data:`CASES`; ``section``, ``params`` and ``rule`` change what their names say."""
    chosen = CASES[case]
    section = {**chosen.megalr["parametrization"], **changes.pop("section", {})}
    params = {**chosen.optimizer["params"], **changes.pop("params", {})}
    rule = changes.pop("rule", chosen.optimizer["type"])
    config = configuration(stage, accumulation, **changes)
    config["train_batch_size"] = rule_training.SEQUENCES
    config["train_micro_batch_size_per_gpu"] = rule_training.SEQUENCES // accumulation // dist.get_world_size()
    config["optimizer"] = {"type": rule, "params": params}
    config["megalr"] = {**chosen.megalr, "parametrization": section}
    return config


def engine_of(config: dict[str, Any]) -> Any:
    """A fresh odd model under a fresh engine."""
    return megalr.initialize(model=odd_model(), config=config)[0]


def train(stage: int, case: str, accumulation: int = 1, **changes: Any) -> dict[str, Tensor] | None:
    """Train from the start; rank 0 returns fp32 weights, dense where the parametrization has such."""
    config = factored_configuration(stage, case, accumulation, **changes)
    engine = engine_of(config)
    run_steps(engine, rule_training.batches(STEPS))
    state = megalr.consolidated_state_dict(engine)
    engine.destroy()
    parametrization = MegalrConfig.from_json(config).parametrization
    return state if state is None or parametrization.not_dense else densify(state, parametrization)


def everything(engine: Any) -> dict[str, Any]:
    """All that training depends on, of this rank."""
    seen = rule_training.everything(engine)
    seen.update({f"buffer {name}": buffer.clone() for name, buffer in engine.module.named_buffers()})
    events = engine.basic_optimizer.layer_events
    if events is None:
        return seen
    tensors = {
        f"{key} {piece.offsets}": piece.data for key, entry in events.entries().items() for piece in entry.pieces
    }
    return seen | _flat(events.numbers() | tensors, "events")


def _flat(value: Any, path: str) -> dict[str, Any]:
    if isinstance(value, dict):
        return {where: leaf for key, each in value.items() for where, leaf in _flat(each, f"{path} {key}").items()}
    return {path: value.clone() if isinstance(value, Tensor) else value}


def zeroed(stage: int, case: str, updates: int, **changes: Any) -> dict[str, float]:
    """After some updates: the share of the factors' moments that are zero, on all ranks together, by kind."""
    engine = engine_of(factored_configuration(stage, case, **changes))
    run_steps(engine, rule_training.batches(updates))
    optimizer = engine.basic_optimizer
    shard, shares = optimizer.prepare(), {}
    factors = [name for name in shard.layout.shapes if name.endswith((".A", ".B"))]
    for key in ("exp_avg", "exp_avg_sq"):
        whole = torch.cat([optimizer.exchange.everywhere(name, optimizer.moments(key)).view(-1) for name in factors])
        shares[key] = (whole == 0).float().mean().item()
    engine.destroy()
    return shares


def resume(stage: int, case: str, folder: str, cut: int = 7, **changes: Any) -> list[str]:
    """Some updates, a checkpoint, more; the last again from the checkpoint. Names of what differs in a bit."""
    config = factored_configuration(stage, case, **changes)
    return lost_by_resuming(lambda: engine_of(config), rule_training.batches(STEPS), cut, folder, everything)
