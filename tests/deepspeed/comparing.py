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


def train_rule(type_name: str, stage: int) -> tuple[dict[str, Tensor] | None, Layout, list[dict[str, tuple[int, ...]]]]:
    """Train the odd model by a rule.

    Returns:
        The weights, on rank 0; the layout that was read; the shapes of each group's parameters, by name.
    """
    engine = engine_of(rule_case(type_name), stage)
    layout = engine.basic_optimizer.prepare().layout
    names = {id(p): name for name, p in engine.module.named_parameters()}
    run(engine, batches(rule_case(type_name).updates))
    weights = megalr.consolidated_state_dict(engine)
    engine.destroy()
    return weights, layout, names
