"""Every parametrization under every way of cutting what it trains, against one plain process, and going on from a save.

A case of which there is no second implementation is compared with one process of ours.
"""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from torch import Tensor

from megalr.layers.registry import PARAMETRIZATIONS
from tests.covering import daily_and_slow, slow_but
from tests.equality import STAGES, WORLDS, Case, assert_equal, batches, run
from tests.odd_model import odd_model
from tests.references.parametrizations import CASES, SETTINGS
from tests.references.parametrizations.common import LAYERS
from tests.references.parametrizations.projected import projected
from tests.world.threads import world
from tests.world.training import ACCUMULATIONS, WAYS, Way, alone, engine_of, train


@functools.cache
def expected(case: Case) -> dict[str, Tensor]:
    return alone(case) if case.plain is None else case.expected


def check(case: Case, stage: int, size: int, accumulation: int = 1, resume: Way | None = None) -> None:
    ranks = train(case, stage, size, accumulation, resume=resume)
    assert_equal(ranks[0].weights, expected(case), case.bound)
    for rank in ranks:
        assert rank.lost == []
        assert all(torch.equal(rank.weights[name], w) for name, w in ranks[0].weights.items())
        assert (rank.updates, rank.refreshes) == (case.updates, ranks[0].refreshes)


@pytest.mark.parametrize(
    ("title", "stage", "size", "accumulation", "resume"),
    daily_and_slow(list(CASES), STAGES, WORLDS, ACCUMULATIONS, turns=[WAYS]),
)
def test_equals_one_plain_process_and_resumes_bitwise(title, stage, size, accumulation, resume):
    check(CASES[title], stage, size, accumulation, resume)


# Stages 1 and 2 cut alike. What they do otherwise with gradients shows in the cases above.
@pytest.mark.parametrize(("title", "stage", "size"), daily_and_slow(list(SETTINGS), (0, 1, 3), WORLDS))
def test_settings_equal_one_plain_process(title, stage, size):
    check(SETTINGS[title], stage, size)


# Frozen W0 in bf16, and how it takes over what was learned: the first case of each type that adds to it.
FIRST = {case.megalr.get("parametrization", {}).get("type"): title for title, case in reversed(CASES.items())}
ROUNDED = [FIRST[name] for name, kind in PARAMETRIZATIONS.items() if hasattr(kind, "merge_rounding") and name in FIRST]
BF16_BOUND = 0.05


@pytest.mark.parametrize(
    ("title", "rounding", "stage", "resume"),
    daily_and_slow(ROUNDED, ("nearest", "stochastic", "remainder"), STAGES, turns=[WAYS]),
)
def test_merges_into_bf16_stay_close_and_resume_bitwise(title, rounding, stage, resume):
    case = CASES[title]
    section = {**case.megalr["parametrization"], "merge_rounding": rounding}
    ranks = train(case, stage, 2, resume=resume, bf16={"enabled": True}, megalr={"parametrization": section})
    assert_equal(ranks[0].weights, case.expected, BF16_BOUND)
    assert [rank.lost for rank in ranks] == [[], []]


@pytest.mark.parametrize(
    ("variant", "stage"),
    slow_but(
        itertools.product(("frozen", "unused", "tied"), STAGES),
        [("frozen", 0), ("unused", 1), ("tied", 2), ("frozen", 3), ("unused", 3)],
    ),
)
def test_frozen_unused_and_tied_parameters_beside_projected_layers(variant, stage):
    targets = {"target_modules": [*LAYERS["target_modules"], "mlp_unused"]} if variant == "unused" else {}
    case = projected(functools.partial(odd_model, **{variant: True}), **LAYERS | targets)
    assert_equal(train(case, stage, 3)[0].weights, alone(case))


EXCHANGING = ("low-rank, reset of all", "loro", "projected", "switchlora", "sltrain, restarts")


@pytest.mark.parametrize("title", EXCHANGING)
@pytest.mark.parametrize(
    "changes",
    [
        {"zero_optimization": {"stage": 1}, "megalr": {"exchange_bucket_bytes": 1}},
        {"zero_optimization": {"stage": 3}, "megalr": {"exchange_bucket_bytes": 1}},
        {"zero_optimization": {"stage": 3, "sub_group_size": 100}},
    ],
    ids=["one unit a round, stage 1", "one unit a round, stage 3", "sub-groups smaller than a pair"],
)
def test_rounds_and_sub_groups(title, changes):
    case = {**CASES, **SETTINGS}[title]
    assert_equal(train(case, changes["zero_optimization"]["stage"], 3, **changes)[0].weights, case.expected)


def test_sub_groups_that_split_a_shared_basis():
    case = CASES["projected, shared"]
    got = train(case, 3, 2, zero_optimization={"stage": 3, "sub_group_size": 100})
    assert_equal(got[0].weights, case.expected)


def zeroed(case, dense, stage, updates):
    """The share of the factors' moments that are zero, on all ranks together, by kind."""
    engine = engine_of(case, dense, stage)
    run(engine, batches(updates))
    optimizer, shares = engine.basic_optimizer, {}
    factors = [name for name in optimizer.prepare().layout.shapes if name.endswith((".A", ".B"))]
    for key in ("exp_avg", "exp_avg_sq"):
        whole = [optimizer.exchange.everywhere(name, optimizer.moments(key)).view(-1) for name in factors]
        shares[key] = (torch.cat(whole) == 0).float().mean().item()
    return shares


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("title", "least"), [("relora, magnitude", 0.8), ("relora, random", 0.7), ("relora, reset", 1.0)]
)
def test_a_merge_of_relora_really_zeroes_the_moments(title, least, stage):
    case = CASES[title]
    for shares in world(3, zeroed, case, case.model(), stage, 4):
        assert all(least - 0.03 < share <= min(1.0, least + 0.15) for share in shares.values()), shares
