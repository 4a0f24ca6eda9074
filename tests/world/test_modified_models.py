"""Frozen, unfrozen and written parameters under every rule and parametrization: no engine's own check is in the way."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch.distributed as dist

from megalr.errors import UserError
from tests.covering import slow_but
from tests.equality import STAGES, Case, batches, different, everything, rule_case, run
from tests.references import REFERENCES
from tests.references.parametrizations import CASES
from tests.world.threads import world
from tests.world.training import engine_of

PARAMETRIZATIONS = [f"layers: {name}" for name in CASES]
DAILY = [
    ("Muon", 0, 1),
    ("GaLoreAdamW", 2, None),
    ("BAdam", 3, 1),
    ("layers: low-rank", 0, None),
    ("layers: low-rank", 3, 1),
    ("layers: projected", 2, 1),
    ("layers: switchlora", 1, None),
]


def modified(case: Case, dense: Any, stage: int, only_rank: int | None) -> list[tuple[str, list[str]]]:
    """Updates; then of each group a parameter is frozen, on one rank or all: what is said, and what has changed."""
    engine, data = engine_of(case, dense, stage), batches(3)
    run(engine, data[:2])
    before, found = everything(engine), []
    for group in engine.basic_optimizer.groups:
        name, parameter = next(reversed(group.parameters.items()))
        parameter.requires_grad_(only_rank not in (None, dist.get_rank()))
        try:
            run(engine, data[2:])
            words = ""
        except UserError as error:
            words = str(error)
        parameter.requires_grad_(True)
        engine._gradient.zero_()
        found.append((words if f": {name}." in words else "", different(before, everything(engine))))
    run(engine, data[2:])  # thawed, it goes on
    return [*found, ("", different(before, everything(engine))[:1])]


@pytest.mark.parametrize(
    ("name", "stage", "only_rank"),
    slow_but(itertools.product([*REFERENCES, *PARAMETRIZATIONS], STAGES, (None, 1)), DAILY),
)
def test_what_is_frozen_in_mid_run_stays_and_all_ranks_say_so(name, stage, only_rank):
    case = CASES[name.removeprefix("layers: ")] if name in PARAMETRIZATIONS else rule_case(name)
    results = world(2, modified, case, case.model(), stage, only_rank)
    for *refused, (_, thawed) in results:
        assert len(refused) > 1
        for words, changed in refused:
            assert words.startswith("frozen after the engine was made")
            assert words.endswith("(seen on rank 1 alone)") is (only_rank == 1)
            assert changed == []
        assert thawed != []


def written(dense: Any, stage: int) -> list[str]:
    """A weight is written on the second of three ranks: what each says."""
    engine, data = engine_of(rule_case("Muon"), dense, stage, bf16={"enabled": True}), batches(2)
    run(engine, data[:1])
    if dist.get_rank() == 1:
        for parameter in engine.module.parameters():
            parameter.data.add_(1)
    with pytest.raises(UserError) as caught:
        run(engine, data[1:])
    return [str(caught.value)]


@pytest.mark.parametrize("stage", STAGES)
def test_what_one_rank_has_written_stops_all(stage):
    said = world(3, written, rule_case("Muon").model(), stage)
    assert said == [said[0]] * 3
    assert said[0][0].startswith("written since the last update: ")
    assert said[0][0].endswith("(seen on rank 1 alone)")
