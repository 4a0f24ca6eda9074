"""What the ranks run to be compared with one plain process, or with another engine."""

from __future__ import annotations

from typing import Any

from torch import Tensor

import megalr
from megalr.layout.layout import Layout
from tests.equality import Case, batches, configuration, rule_case, run


def engine_of(case: Case, stage: int, accumulation: int = 1, **changes: Any) -> Any:
    """A fresh model under a fresh engine."""
    return megalr.initialize(model=case.model(), config=configuration(case, stage, accumulation, **changes))[0]


def train_rule(type_name: str, stage: int) -> tuple[dict[str, Tensor] | None, Layout]:
    """Train the odd model by a rule; the weights, on rank 0, and the layout that was read."""
    case = rule_case(type_name)
    engine = engine_of(case, stage)
    run(engine, batches(case.updates))
    weights, layout = megalr.consolidated_state_dict(engine), engine.basic_optimizer.prepare().layout
    engine.destroy()
    return weights, layout
