"""A gradient that is not finite on one rank: all skip the update, nothing has changed, and the next is as usual."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch.distributed as dist

from tests.covering import daily_and_slow
from tests.equality import STAGES, Case, assert_equal, batches, different, everything, rule_case, run
from tests.references import REFERENCES
from tests.references.parametrizations import CASES
from tests.world.threads import world
from tests.world.training import engine_of, whole_weights

GOOD = 3  # updates before the bad one
BAD = {"inf": math.inf, "nan": math.nan}


def poison(
    case: Case,
    dense: Any,
    stage: int,
    at: int,
    updates: int,
    where: str,
    only_rank: int | None,
    value: float,
    looks: bool,
) -> tuple[list[str], list[str], tuple[int, int], dict[str, Any]]:
    """Updates, one of them with a gradient that is not finite.

    Returns:
        What the bad update changed, by name; masters that the one after it did not; updates skipped by the engine and
        by the optimizer; the weights at the end.
    """
    engine, data = engine_of(case, dense, stage, looks=looks), batches(updates)
    run(engine, data[:at])
    before = everything(engine)

    def spoil(grad: Any) -> Any:
        spoiled = grad.clone()
        spoiled.view(-1)[-1] = value
        return spoiled

    parameter = dict(engine.module.named_parameters())[where]
    hook = parameter.register_hook(spoil) if only_rank in (None, dist.get_rank()) else None
    run(engine, data[at : at + 1])
    if hook is not None:
        hook.remove()
    after = everything(engine)
    run(engine, data[at + 1 : at + 2])
    moved = different(after, everything(engine))
    still = [key for key in after if key.startswith("weights/") and key not in moved]
    run(engine, data[at + 2 :])
    skipped = engine.skipped, engine.basic_optimizer.skipped
    return different(before, after), still, skipped, case.weights(whole_weights(engine))


@pytest.mark.parametrize(
    ("type_name", "stage", "looks", "value", "only_rank"),
    daily_and_slow(list(REFERENCES), STAGES, turns=[(True, False), tuple(BAD), (None, 1)]),
)
def test_every_rule_skips_a_gradient_that_is_not_finite(type_name, stage, looks, value, only_rank):
    case = rule_case(type_name)
    where = "mlp_tall.weight" if stage % 2 else "norm.weight"  # of the first group, or of the last
    results = world(2, poison, case, case.model(), stage, GOOD, GOOD + 2, where, only_rank, BAD[value], looks)
    for changed, still, skipped, _ in results:
        assert changed == []
        assert still == [] or REFERENCES[type_name].rests  # a rank may hold nothing of what is active
        assert skipped == ((1, 0) if looks else (0, 1))


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("value", BAD)
def test_in_the_last_group_and_without_clipping(stage, value):
    """The engine steps group by group: the first must not move before the last has been looked at."""
    case = replace(rule_case("GaLoreAdamW"), clip=0.0)
    results = world(2, poison, case, case.model(), stage, GOOD, GOOD + 2, "norm.weight", 0, BAD[value], False)
    assert [result[:3] for result in results] == [([], [], (0, 1))] * 2


# What has events, and a parameter of it.
EVENTS = {
    "projected": "mlp_tall.R",
    "relora, magnitude": "mlp_tall.B",
    "loro": "mlp_square.A",
    "switchlora": "mlp_wide.B",
    "sltrain, restarts": "mlp_tall.values",
    "velora, GaLoreAdamW": "mlp_tall.weight",
}


@pytest.mark.parametrize(
    ("title", "stage", "at", "looks"), daily_and_slow(list(EVENTS), STAGES, (0, 5, 7), turns=[(True, False)])
)
def test_events_are_as_if_a_bad_update_had_not_been(title, stage, looks, at):
    """Layers have added up the bad gradient when the update is skipped. At 5 refreshes, merges and steps are due."""
    case = CASES[title]
    results = world(2, poison, case, case.model(), stage, at, case.updates, EVENTS[title], 1, math.inf, looks)
    data = batches(case.updates)
    del data[at]
    for changed, _, _, weights in results:
        assert changed == []
        assert_equal(weights, case.plain(case.model(), data, case.clip))
