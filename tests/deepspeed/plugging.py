"""What the ranks run in the tests of methods that a user adds: the examples' rule and layers, a rule with numbers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

import megalr
from megalr.rules.base import Basis, Rule, Shape, State, tensor
from megalr.rules.registry import RULES
from tests.deepspeed.rule_training import STEPS, batches, engine_of, everything, rule_configuration
from tests.deepspeed.training import lost_by_resuming, run_steps
from tests.references.common import MATRICES

EXAMPLES = Path(__file__).parents[2] / "examples"
EXAMPLE = EXAMPLES / "own_rule.py"
TYPE = "RowNormalizedMomentum"
PARAMS = {**MATRICES, "momentum": 0.8}
# The layers in tests.deepspeed.training's LLaMA, with momentum resets of B and A.
LAYERS = {
    "parametrization": {"type": "gained_low_rank", "rank": 5},
    "refactorization": None,
    "momentum_reset": {"interval": 5, "scope": "factors", "warmup_steps": 2},
    "plugins": [str(EXAMPLES / "own_layers.py")],
}


def configuration(stage: int, accumulation: int = 1) -> dict[str, Any]:
    """A DeepSpeed JSON with the example's rule."""
    config = rule_configuration(stage, "AdamW", accumulation, megalr={"plugins": [str(EXAMPLE)]})
    config["optimizer"] = {"type": TYPE, "params": PARAMS}
    return config


def train(stage: int, accumulation: int = 1) -> tuple[dict[str, Tensor] | None, int, str]:
    """The fp32 masters on rank 0; on every rank the calls of the rule and the routing table."""
    engine = engine_of(configuration(stage, accumulation))
    run_steps(engine, batches(STEPS))
    weights = megalr.consolidated_state_dict(engine)
    calls, table = engine.basic_optimizer.rule_calls, engine.basic_optimizer.routing_table()
    engine.destroy()
    return weights, calls, table


def resume(stage: int, folder: str) -> list[str]:
    """Seven updates, a checkpoint, five more; the last five again from the checkpoint. Names of what differs."""
    return lost_by_resuming(lambda: engine_of(configuration(stage)), batches(STEPS), 7, folder, everything)


@dataclass(frozen=True, kw_only=True)
class RunningPower(Rule):
    """Momentum whose bias correction is a running float; and numbers that count nothing."""

    name: ClassVar[str] = "running_power"

    def init_state(self, shape: Shape, device: torch.device | str = "cpu") -> State:
        return {"m": torch.zeros(shape, device=device), "pow": 1.0, "odd": False, "last": -1, "least": float("inf")}

    def update(self, grad: Tensor, state: State, basis: Basis | None) -> Tensor:
        state["pow"], state["odd"] = float(state["pow"]) * 0.9, not state["odd"]
        state["least"] = min(float(state["least"]), grad.norm().item())
        return tensor(state, "m").lerp_(grad, 0.1) / (1 - state["pow"])

    def state_numel(self, shape: Shape) -> int:
        return shape[0] * shape[1]

    def flops(self, shape: Shape) -> float:
        return 6.0 * shape[0] * shape[1]


def keep_numbers(before: int, after: int, folder: str) -> tuple[State, State, State]:
    """Numbers of this rank's states: when a checkpoint of each kind is saved, and as another engine loads them.

    Args:
        before, after: ZeRO stages of the engine that saves, and of one that loads megalr's checkpoint.
        folder: of the checkpoints.
    """
    if "RunningPower" not in RULES:
        megalr.register_rule("RunningPower")(RunningPower)

    def started(stage: int) -> Any:
        config = rule_configuration(stage, "AdamW")
        config["optimizer"] = {"type": "RunningPower", "params": MATRICES}
        return engine_of(config)

    def numbers(engine: Any) -> State:
        kept = engine.basic_optimizer.matrices.numbers()
        return {f"{name} {key}": value for name, state in kept.items() for key, value in state.items()}

    engine = started(before)
    run_steps(engine, batches(3))
    megalr.save_checkpoint(engine, f"{folder}/megalr")
    engine.save_checkpoint(f"{folder}/deepspeed")
    found = [numbers(engine)]
    engine.destroy()
    engine = started(before)
    engine.load_checkpoint(f"{folder}/deepspeed")
    found.append(numbers(engine))
    engine.destroy()
    engine = started(after)
    megalr.load_checkpoint(engine, f"{folder}/megalr")
    found.append(numbers(engine))
    engine.destroy()
    saved, same_layout, other_layout = found
    return saved, same_layout, other_layout
