"""What the ranks run in the tests of methods that a user adds: the examples' rule and layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

import megalr
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
