"""Norms on the heads of cut attention, of whose gradient each tensor-parallel rank has a part: against one process."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.deepspeed import heads_training
from tests.deepspeed.harness import RankPool
from tests.deepspeed.heads_training import NORMS, SPECS, SUMMED
from tests.deepspeed.test_rules import assert_same_weights

pytestmark = pytest.mark.distributed
TRAIN = "tests.deepspeed.heads_training:train"
KINDS = ("low_rank", "sltrain", "projected, input")
DAILY = [("low_rank", 0, 2), ("sltrain", 1, 2), ("projected, input", 3, 2), ("low_rank", 2, 4)]
ROWS = [
    pytest.param(*row, marks=[] if row in DAILY else pytest.mark.slow)
    for row in itertools.product(KINDS, (0, 1, 2, 3), (2, 4))
]


@pytest.mark.parametrize(("kind", "stage", "processes"), ROWS)
def test_groups_of_the_users_own_equal_one_process(ranks, kind, stage, processes):
    """Two tensor-parallel ranks, which may have replicas with other data."""
    got = ranks(processes).run(TRAIN, 2, stage, kind)
    assert_same_weights(got[0].weights, one_process(ranks, kind), 1e-4)
    assert all(each.apart == [] for each in got)


@functools.cache
def one_process(ranks: Callable[[int], RankPool], kind: str, **model: Any) -> dict[str, torch.Tensor]:
    return ranks(1).run(TRAIN, 1, 0, kind, model=model)[0].weights


@pytest.mark.parametrize(
    "stage", [0, pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)]
)
def test_accumulation(ranks, stage):
    """Each micro-batch's gradient is summed once."""
    got = ranks(2).run(TRAIN, 2, stage, "sltrain", accumulation=4)
    assert_same_weights(got[0].weights, one_process(ranks, "sltrain"), 1e-4)
    assert got[0].apart == []


@pytest.mark.parametrize("stage", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_bf16_copies_stay_the_same(ranks, stage):
    got = ranks(2).run(TRAIN, 2, stage, "sltrain", bf16={"enabled": True})
    assert got[0].apart == []


@pytest.mark.parametrize("stage", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_norms_of_the_users_own_with_a_plan_of_the_users_own(ranks, stage):
    """The plan names their weights alone; their biases see the same heads."""
    got = ranks(2).run(TRAIN, 2, stage, "sltrain", specs=SUMMED, model={"own_norms": True})
    assert_same_weights(got[0].weights, one_process(ranks, "sltrain", own_norms=True), 1e-4)
    assert got[0].apart == []


def test_norms_that_no_plan_names_drift_apart_and_the_guard_says_so(ranks):
    guards = {"guards": {"check_replicas_every": 2}}
    for each in ranks(2).run(TRAIN, 2, 1, "sltrain", specs=SPECS, section=guards):
        assert "q_norm.weight" in each.message and "k_norm.weight" in each.message, each.message


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("sltrain", {}),
        ("sltrain", {"autotp": True}),
        ("full", {"autotp": True}),
        ("full", {"autotp": True, "second_way": True}),
    ],
    ids=["mpu", "AutoTP", "AutoTP, dense", "build_optimizer"],
)
def test_frozen_norms_stay_still(ranks, kind, how):
    frozen = {"frozen": ("0.self_attn.q_norm", "1.self_attn.k_norm")}
    got = ranks(2).run(TRAIN, 2, 1, kind, model=frozen, **how)
    assert_same_weights(got[0].weights, one_process(ranks, kind, **frozen), 1e-4)
    assert got[0].apart == []
    start = dict(heads_training.qwen3().named_parameters())
    moved = {name for name in start if any(norm in name for norm in NORMS) and different(name, start, got[0].weights)}
    assert moved == {"model.layers.1.self_attn.q_norm.weight", "model.layers.0.self_attn.k_norm.weight"}


def different(name: str, before: dict[str, Any], after: dict[str, torch.Tensor]) -> bool:
    return not torch.equal(before[name].detach(), after[name])
