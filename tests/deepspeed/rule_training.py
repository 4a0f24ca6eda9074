"""What the ranks run in the tests of rules: an odd model under DeepSpeed, one rule on its matrices."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor

import megalr
from megalr.hosts import held
from tests import equality
from tests.deepspeed import training
from tests.deepspeed.training import configuration, lost_by_resuming, run_steps, same
from tests.odd_model import odd_model
from tests.references import REFERENCES

STEPS = equality.UPDATES
SEQUENCES, LENGTH, batches = equality.SEQUENCES, equality.LENGTH, equality.batches
# Every rule with a schedule that refreshes each basis at least twice in twelve updates.
RULES: dict[str, dict[str, Any]] = {name: dict(reference.trained_with) for name, reference in REFERENCES.items()}


def rule_configuration(stage: int, optimizer: str, accumulation: int = 1, **changes: Any) -> dict[str, Any]:
    """A DeepSpeed JSON with the rule's settings from :data:`RULES`."""
    params = {**RULES[optimizer], **changes.pop("params", {})}
    section = {"type": optimizer, "params": params}
    config = configuration(stage, accumulation, **changes)
    config["train_batch_size"] = SEQUENCES
    config["train_micro_batch_size_per_gpu"] = SEQUENCES // accumulation // dist.get_world_size()
    config["optimizer"] = section
    config["megalr"] = {"exchange_bucket_bytes": 20_000, **changes.get("megalr", {})}
    return config


def engine_of(config: dict[str, Any], **variant: bool) -> Any:
    """A fresh odd model under a fresh engine."""
    return megalr.initialize(model=odd_model(**variant), config=config)[0]


def train_rule(
    stage: int, optimizer: str, accumulation: int = 1, variant: dict[str, bool] | None = None, **changes: Any
) -> tuple[dict[str, Tensor] | None, dict[str, int]]:
    """Train from the start; rank 0 returns the fp32 masters, every rank its counts."""
    engine = engine_of(rule_configuration(stage, optimizer, accumulation, **changes), **(variant or {}))
    run_steps(engine, batches(STEPS))
    weights = megalr.consolidated_state_dict(engine)
    base = engine.basic_optimizer
    counts = {"calls": base.rule_calls, "updates": base.updates, "bytes": base.bytes_moved}
    engine.destroy()
    return weights, counts


def poison(
    stage: int, optimizer: str, where: str, only_rank: int | None, value: float = float("inf"), **changes: Any
) -> tuple[list[str], list[str], int]:
    """Three updates, one with a gradient that is not finite, one more.

    Returns:
        What the bad update changed, by name; what the good one after it did not; updates skipped by the optimizer.
    """
    engine = engine_of(rule_configuration(stage, optimizer, **changes))
    return poison_engine(engine, where, only_rank, value)


def poison_engine(
    engine: Any, where: str, only_rank: int | None, value: float = float("inf")
) -> tuple[list[str], list[str], int]:
    """:func:`poison` of a fresh engine."""
    data = batches(5)
    run_steps(engine, data[:3])
    before = everything(engine)
    parameter = dict(engine.module.named_parameters())[where]
    active = only_rank is None or dist.get_rank() == only_rank

    def spoil(grad: Tensor) -> Tensor:
        spoiled = grad.clone()
        spoiled.view(-1)[-1] = value
        return spoiled

    hook = parameter.register_hook(spoil) if active else None
    run_steps(engine, data[3:4])
    if hook is not None:
        hook.remove()
    after = everything(engine)
    changed = [key for key, held in before.items() if not same(held, after[key])]
    run_steps(engine, data[4:])
    last = everything(engine)
    moved = [key for key, held in after.items() if key.startswith("master") and same(held, last[key])]
    skipped = engine.basic_optimizer.skipped
    engine.destroy()
    return changed, moved, skipped


def resume(stage: int, optimizer: str, folder: str, **changes: Any) -> list[str]:
    """Seven updates, a checkpoint, five more; the last five again from the checkpoint. Names of what differs."""
    config = rule_configuration(stage, optimizer, **changes)
    return lost_by_resuming(lambda: engine_of(config), batches(STEPS), 7, folder, everything)


def resume_factors(stage: int, folder: str, **changes: Any) -> list[str]:
    """The same on low-rank factors: eleven updates, of 20 with refactorizations and momentum resets."""
    config = configuration(stage, scheduler=training.WARMUP_COSINE, **changes)
    return lost_by_resuming(lambda: training.engine_of(config), training.batches(20), 11, folder, everything)


def one_update(stage: int, optimizer: str, clipping: float) -> dict[str, Tensor] | None:
    """The masters after one update without weight decay."""
    config = rule_configuration(stage, optimizer, params={"weight_decay": 0.0}, gradient_clipping=clipping)
    engine = engine_of(config)
    run_steps(engine, batches(1))
    weights = megalr.consolidated_state_dict(engine)
    engine.destroy()
    return weights


def resume_with(stage: int, folder: str, **params: Any) -> str:
    """A checkpoint, loaded by an optimizer with other settings; the message, empty where there is none."""
    engine = engine_of(rule_configuration(stage, "GaLoreAdamW"))
    run_steps(engine, batches(1))
    engine.save_checkpoint(folder)
    engine.destroy()
    engine = engine_of(rule_configuration(stage, "GaLoreAdamW", params=params))
    try:
        engine.load_checkpoint(folder)
    except megalr.UserError as error:
        return str(error)
    finally:
        engine.destroy()
    return ""


def everything(engine: Any) -> dict[str, Any]:
    """All that training depends on, of this rank: weights, masters, element-wise moments, matrix states, counts."""
    optimizer = engine.basic_optimizer
    shard = optimizer.prepare()
    seen: dict[str, Any] = {}
    for name, parameter in engine.module.named_parameters():
        # Not the padding of stage 3, which nobody reads and nobody writes.
        seen[f"weight {name}"] = held(parameter)[0][1].detach().clone()
    seen.update({f"master {i}": buffer.clone() for i, buffer in enumerate(shard.buffers)})
    for i, parameter in enumerate(shard.parameters):
        seen.update({f"moment {i} {k}": v.clone() for k, v in optimizer.state.get(parameter, {}).items()})
    for name, state in optimizer.matrix_states.items():
        for key, value in state.items():
            seen[f"state {name} {key}"] = value.clone() if isinstance(value, Tensor) else value
    clocks = {name: vars(clock).copy() for name, clock in optimizer.clocks.items()}
    seen["counts"] = (optimizer.updates, clocks)
    return seen
