"""Every rule under every way of cutting its matrices, against one plain process, and going on from a save."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.covering import covering, daily_and_slow
from tests.equality import (
    STAGES,
    UPDATES,
    WORLDS,
    Case,
    assert_equal,
    batches,
    calls_of,
    errors,
    rule_case,
    run,
    without_reference,
)
from tests.references import OPTIONS, REFERENCES
from tests.world.threads import world
from tests.world.training import ACCUMULATIONS, WAYS, alone, engine_of, train, whole_weights

RULES = list(REFERENCES)


@functools.cache
def case_of(type_name: str) -> Case:
    return rule_case(type_name)


@pytest.mark.parametrize(
    ("type_name", "stage", "size", "accumulation", "resume"),
    daily_and_slow(RULES, STAGES, WORLDS, ACCUMULATIONS, turns=[WAYS]),
)
def test_equals_one_plain_process_and_resumes_bitwise(type_name, stage, size, accumulation, resume):
    case = case_of(type_name)
    ranks = train(case, stage, size, accumulation, resume=resume)
    assert_equal(ranks[0].weights, case.expected, case.bound)
    for rank in ranks:
        assert rank.lost == []
        assert all(torch.equal(rank.weights[name], w) for name, w in ranks[0].weights.items())
        assert rank.updates == UPDATES
    # The rule really ran: once for each active matrix and update, over all ranks; at stage 0 on each of them.
    calls, once = [rank.calls for rank in ranks], calls_of(case)
    assert calls == [once] * size if stage == 0 else sum(calls) == once


@pytest.mark.parametrize(("option", "stage"), [(option, STAGES[i % len(STAGES)]) for i, option in enumerate(OPTIONS)])
def test_options(option, stage):
    type_name, title = option
    case = rule_case(type_name, **REFERENCES[type_name].options[title])
    assert_equal(train(case, stage, 3)[0].weights, case.expected, case.bound)
    assert max(errors(case.expected, case_of(type_name).expected).values()) > 1e-3  # it does something


@functools.cache
def by_projector(projector: str) -> tuple[Case, dict[str, Tensor]]:
    """A case, and what one process of ours gives: there is no second implementation of fast projectors."""
    case = without_reference(rule_case("GaLoreAdamW", projector=projector))
    return case, alone(case)


@pytest.mark.parametrize("projector", ["eigh", "randomized", "power"])
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_fast_projectors_are_the_same_however_cut(projector, stage):
    case, expected = by_projector(projector)
    assert_equal(train(case, stage, 3)[0].weights, expected)


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "sub-groups smaller than a matrix": (3, {"zero_optimization": {"stage": 3, "sub_group_size": 150}}),
    "one matrix a round": (3, {"megalr": {"exchange_bucket_bytes": 1}}),
    "one matrix a round, stage 1": (1, {"megalr": {"exchange_bucket_bytes": 1}}),
    "all matrices in one round": (3, {"megalr": {"exchange_bucket_bytes": 10**9}}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_variants(layout):
    stage, changes = LAYOUTS[layout]
    case = case_of("GaLoreAdamW")
    ranks = train(case, stage, 3, resume="state_dict", **changes)
    assert_equal(ranks[0].weights, case.expected)
    assert [rank.lost for rank in ranks] == [[]] * 3


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("variant", ["frozen", "unused", "tied"])
def test_frozen_unused_and_tied_parameters(stage, variant):
    case = rule_case(["GaLoreAdamW", "Muon", "FiraAdamW", "LDAdamW"][stage], variant=[variant])
    assert_equal(train(case, stage, 3)[0].weights, case.expected)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("targets", [["narrow"], ["mlp_row"]])
def test_fewer_matrices_than_ranks(stage, targets):
    case = rule_case("GaLoreAdamW", target_modules=targets, rank=1)
    ranks = train(case, stage, 4)
    assert_equal(ranks[0].weights, case.expected)
    assert sum(rank.calls for rank in ranks) == calls_of(case) * (4 if stage == 0 else 1)


# Head and embeddings by the rule, which are one where they are tied.
ENDS: dict[str, tuple[str, dict[str, bool], list[str]]] = {
    "embeddings": ("SCALE", {"head": False, "embeddings": True}, []),
    "head": ("SCALE", {"head": True, "embeddings": False}, []),
    "both": ("Muon", {"head": True, "embeddings": True}, []),
    "tied": ("SCALE", {"head": True, "embeddings": True}, ["tied"]),
}


@pytest.mark.parametrize(("end", "stage", "size"), daily_and_slow(list(ENDS), (1, 3), turns=[(2, 3)]))
def test_head_and_embeddings_by_the_rule(end, stage, size):
    type_name, params, variant = ENDS[end]
    case = rule_case(type_name, variant=variant, **params)
    assert_equal(train(case, stage, size)[0].weights, case.expected)


# bf16 weights and gradients round at 2⁻⁹; the masters follow the fp32 run to the accuracy of such gradients.
BF16_BOUND = 0.05


@pytest.mark.parametrize(("type_name", "stage", "resume"), covering(["GaLoreAdamW", "Muon"], STAGES, WAYS))
def test_bf16(type_name, stage, resume):
    case = case_of(type_name)
    ranks = train(case, stage, 3, resume=resume, bf16={"enabled": True})
    assert_equal(ranks[0].weights, case.expected, BF16_BOUND)
    assert [rank.lost for rank in ranks] == [[]] * 3
    assert sum(rank.calls for rank in ranks) == calls_of(case) * (3 if stage == 0 else 1)


def one_update(case, dense, stage, clip):
    engine = engine_of(case, dense, stage, gradient_clipping=clip)
    run(engine, batches(1))
    return whole_weights(engine)


@pytest.mark.parametrize("stage", STAGES)
def test_clipping_acts_on_gradients_not_on_updates(stage):
    """Muon's update does not depend on the gradient's size, so clipping a hundredfold must not shrink it."""
    case = rule_case("Muon", weight_decay=0.0)
    start = case.model().state_dict()
    clipped, free = (world(2, one_update, case, case.model(), stage, clip)[0] for clip in (1e-2, 1e6))
    for name in (name for name in start if "mlp" in name and "bias" not in name):
        moved, expected = clipped[name] - start[name], free[name] - start[name]
        assert (moved - expected).norm() < 1e-2 * expected.norm(), name
