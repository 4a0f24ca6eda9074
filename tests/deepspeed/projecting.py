"""What the ranks run in the tests of projected layers."""

from __future__ import annotations

from typing import Any
from unittest import mock

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

import megalr
from megalr.config.settings import MegalrConfig
from megalr.hosts.deepspeed_config import deepspeed_section
from megalr.layers import densify
from megalr.layout.exchange import Exchange
from megalr.optim.events.refresh import Refresh, refresh
from tests.deepspeed import rule_training
from tests.deepspeed.training import configuration, dense_model, lost_by_resuming, run_steps, same
from tests.odd_model import odd_model
from tests.references.parametrizations import CASES
from tests.references.parametrizations.common import ADAMW

STEPS = rule_training.STEPS
ODD = dict(CASES["projected"].megalr["parametrization"])
LLAMA = {"type": "projected", "rank": 5, "update_proj_gap": 5, "target_modules": ["attn", "mlp"]}


def projected_configuration(stage: int, accumulation: int = 1, **changes: Any) -> dict[str, Any]:
    """A JSON with projected layers; ``section`` changes the "parametrization", ``model`` is "llama" or "odd"."""
    section = {**(ODD if changes.pop("model", "odd") == "odd" else LLAMA), **changes.pop("section", {})}
    params = {**ADAMW, **changes.pop("params", {})}
    config = configuration(stage, accumulation, **changes)
    config["train_batch_size"] = rule_training.SEQUENCES
    config["train_micro_batch_size_per_gpu"] = rule_training.SEQUENCES // accumulation // dist.get_world_size()
    config["optimizer"] = {"type": "AdamW", "params": params}
    config["megalr"] = {"parametrization": section}
    return config


def engine_of(config: dict[str, Any], model: str = "odd", **variant: bool) -> Any:
    """A fresh model under a fresh engine."""
    return megalr.initialize(model=odd_model(**variant) if model == "odd" else dense_model(), config=config)[0]


def train(
    stage: int,
    accumulation: int = 1,
    steps: int = STEPS,
    model: str = "odd",
    variant: dict[str, bool] | None = None,
    **changes: Any,
) -> tuple[dict[str, Tensor] | None, int]:
    """Train from the start; rank 0 returns dense fp32 weights, every rank the refreshes that it has counted."""
    config = projected_configuration(stage, accumulation, model=model, **changes)
    engine = engine_of(config, model, **(variant or {}))
    run_steps(engine, rule_training.batches(steps))
    state = megalr.consolidated_state_dict(engine)
    refreshes = engine.basic_optimizer.refreshes
    engine.destroy()
    dense = None if state is None else densify(state, MegalrConfig.from_json(config).parametrization)
    return dense, refreshes


def everything(engine: Any) -> dict[str, Any]:
    """All that training depends on, of this rank."""
    seen = rule_training.everything(engine)
    optimizer = engine.basic_optimizer
    for name, counts in optimizer.layer_events.numbers()["bases"].items():
        seen[f"basis {name}"] = dict(counts)
    for name, remainder in optimizer.remainders.items():
        seen[f"remainder {name}"] = remainder.clone()
    return seen


def resume(stage: int, folder: str, cut: int = 7, model: str = "odd", **changes: Any) -> list[str]:
    """Some updates, a checkpoint, more; the last again from the checkpoint. Names of what differs in a bit."""
    config = projected_configuration(stage, model=model, **changes)
    data = rule_training.batches(STEPS)
    return lost_by_resuming(lambda: engine_of(config, model), data, cut, folder, everything)


def poison(
    stage: int, at: int, only_rank: int | None, steps: int = STEPS, **changes: Any
) -> tuple[list[str], dict[str, Tensor] | None, int]:
    """Updates, one of them with a gradient that is not finite.

    Returns:
        What the bad update changed, by name; dense fp32 weights at the end, on rank 0; refreshes.
    """
    config = projected_configuration(stage, **changes)
    engine = engine_of(config)
    data = rule_training.batches(steps)
    run_steps(engine, data[:at])
    before = everything(engine)
    parameter = dict(engine.module.named_parameters())["mlp_tall.R"]

    def spoil(grad: Tensor) -> Tensor:
        spoiled = grad.clone()
        spoiled.view(-1)[-1] = float("inf")
        return spoiled

    active = only_rank is None or dist.get_rank() == only_rank
    hook = parameter.register_hook(spoil) if active else None
    run_steps(engine, data[at : at + 1])
    if hook is not None:
        hook.remove()
    after = everything(engine)
    changed = [key for key, held in before.items() if not same(held, after[key])]
    run_steps(engine, data[at + 1 :])
    refreshes = engine.basic_optimizer.refreshes
    state = megalr.consolidated_state_dict(engine)
    engine.destroy()
    dense = None if state is None else densify(state, MegalrConfig.from_json(config).parametrization)
    return changed, dense, refreshes


def refreshes_without_guard(bad: int) -> list[int]:
    """Refreshes made after each update, one of which DeepSpeed skips, where no guard is attached."""
    config = projected_configuration(2)
    model = odd_model()
    megalr.parametrize(model, config)
    optimizer = megalr.build_optimizer(model, config)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_section(config))[0]
    counts = []
    for index, ids in enumerate(rule_training.batches(8)):
        spoil = dict(engine.module.named_parameters())["mlp_tall.R"].register_hook(
            lambda grad, index=index: grad * float("inf") if index == bad else grad
        )
        run_steps(engine, [ids])
        spoil.remove()
        counts.append(optimizer.refreshes)
    engine.destroy()
    return counts


def manual_boundaries(stage: int) -> int:
    """Refreshes after updates of two micro-batches each, whose ends the user tells DeepSpeed."""
    config = projected_configuration(stage)
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu"):
        config[key] //= 2  # one micro-batch an update, as far as DeepSpeed knows
    engine = engine_of(config)
    micro, rank, world = engine.train_micro_batch_size_per_gpu(), dist.get_rank(), dist.get_world_size()
    for ids in rule_training.batches(STEPS):
        for a in range(2):
            engine.set_gradient_accumulation_boundary(a == 1)
            rows = ids[(a * world + rank) * micro :][:micro]
            engine.backward(engine(input_ids=rows, labels=rows).loss)
            engine.step()
    refreshes = engine.basic_optimizer.refreshes
    engine.destroy()
    return refreshes


def overflowing(stage: int) -> tuple[bool, int]:
    """Train with full gradients that are finite but overflow in products; whether bases stay finite, and refreshes."""
    config = projected_configuration(stage, section={"projector": "power", "stagger": False})
    engine = engine_of(config)
    optimizer = engine.basic_optimizer
    data = rule_training.batches(6)
    run_steps(engine, data[:5])

    def enlarged(due: list[Refresh], exchange: Exchange) -> list[tuple[Tensor, Tensor]]:
        for gradient in (gradient for each in due for gradient in each.gradients):
            gradient.whole.fill_(3e38)
        return refresh(due, exchange)

    with mock.patch("megalr.optim.events.projected.refresh", enlarged):
        run_steps(engine, data[5:])
    refreshes = optimizer.refreshes
    state = megalr.consolidated_state_dict(engine)
    engine.destroy()
    return state is None or all(bool(torch.isfinite(w).all()) for n, w in state.items() if "basis" in n), refreshes
