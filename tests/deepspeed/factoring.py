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

STEPS = 12
ADAMW = {"lr": 5e-3, "weight_decay": 0.1, "embedding": {"lr": 1e-2}}
COMMON = {"rank": 5, "target_modules": ["mlp_wide", "mlp_tall", "mlp_square", "mlp_experts_back"]}
REFACTORIZATION = {"interval": 5, "moments": "reset"}
RESET = {"interval": 4, "scope": "factors", "warmup_steps": 3}
RELORA = {"type": "relora", "merge_every": 4, "restart_warmup_steps": 3, **COMMON}
# Each with the events of its kind at least twice in twelve updates: the "parametrization" section, and others.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sltrain": ({"type": "sltrain", "alpha": 10.0, "density": 0.1, **COMMON}, {}),
    "sltrain, restarts": (
        {"type": "sltrain", "density": 0.1, "init": "variance_matched", **COMMON},
        {"refactorization": REFACTORIZATION, "momentum_reset": RESET},
    ),
    "lora": ({"type": "lora", "alpha": 10.0, **COMMON}, {}),
    "lora, refactorized": ({"type": "lora", **COMMON}, {"refactorization": REFACTORIZATION}),
    "relora, magnitude": ({**RELORA, "alpha": 10.0, "prune_ratio": 0.8}, {}),
    "relora, random": ({**RELORA, "moments": "random", "prune_ratio": 0.7}, {}),
    "cola": ({"type": "cola", **COMMON}, {"momentum_reset": RESET}),
    "mora, shared": ({**COMMON, "type": "mora", "mora_type": 1, "rank": 3}, {}),
    "mora, rotated": ({**COMMON, "type": "mora", "rank": 3}, {"momentum_reset": RESET}),
    "loro": ({"type": "loro", "exact_every": 4, "restart_warmup_steps": 3, **COMMON}, {}),
    "loro, factors": (
        {
            "type": "loro",
            "exact_every": 5,
            "restart_warmup_steps": 2,
            "restart": "factors",
            "lazy_lr_scale": 0.6,
            "init": "variance_matched",
        }
        | COMMON,
        {},
    ),
    "switchlora": (
        {"type": "switchlora", "switch_interval": 2.5, "frozen_steps": 1, "descent_steps": 20} | COMMON,
        {},
    ),
    "relora, reset": ({**RELORA, "moments": "reset"}, {}),
    "sltrain, Stable-SPAM": (
        {"type": "sltrain", "density": 0.1, "init": "variance_matched", **COMMON},
        {"refactorization": REFACTORIZATION, "momentum_reset": RESET},
    ),
}
# Of the cases that train by another rule than AdamW: which, and its settings. Its own resets come before updates 6 and
# 12, those of the optimizer after 4, 5, 8, 10 and 12.
RULES: dict[str, tuple[str, dict[str, Any]]] = {
    "sltrain, Stable-SPAM": ("StableSPAM", {"reset_interval": 6, "total_steps": 9}),
}


def factored_configuration(stage: int, case: str, accumulation: int = 1, **changes: Any) -> dict[str, Any]:
    """A JSON for one of :data:`CASES`; ``section``, ``params`` and ``rule`` change what their names say."""
    parametrization, sections = CASES[case]
    section = {**parametrization, **changes.pop("section", {})}
    rule, settings = RULES.get(case, ("AdamW", {}))
    params = {**ADAMW, **settings, **changes.pop("params", {})}
    rule = changes.pop("rule", rule)
    config = configuration(stage, accumulation, **changes)
    config["train_batch_size"] = rule_training.SEQUENCES
    config["train_micro_batch_size_per_gpu"] = rule_training.SEQUENCES // accumulation // dist.get_world_size()
    config["optimizer"] = {"type": rule, "params": params}
    config["megalr"] = {"parametrization": section, **sections}
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
