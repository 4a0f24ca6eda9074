"""Layers with factors under DeepSpeed against one plain process, tensor by tensor: one a stage, and frozen weights.

tests/world has every case at every stage. What is left for DeepSpeed's own doing are frozen weights, which stage 3
cuts, buffers, and its checkpoints; the rest of the product is slow.
"""

from __future__ import annotations

import itertools

import pytest

from tests.covering import slow_but
from tests.deepspeed import factoring
from tests.equality import ACCUMULATIONS, STAGES, WORLDS, assert_equal

pytestmark = pytest.mark.distributed
CASES = list(factoring.CASES)
# Merges and switches of chunks, exact steps of pairs over two groups, values at places that a buffer holds.
DAILY = [
    ("mora, rotated", 0, 2, 1),
    ("sltrain, restarts", 1, 2, 4),
    ("loro", 2, 2, 1),
    ("relora, magnitude", 3, 2, 4),
    ("switchlora", 3, 2, 1),
]


@pytest.mark.parametrize(
    ("case", "stage", "world", "accumulation"),
    slow_but(itertools.product(CASES, STAGES, WORLDS, ACCUMULATIONS), DAILY),
)
def test_equals_one_plain_process(ranks, case, stage, world, accumulation):
    got = ranks(world).run("tests.deepspeed.factoring:train", stage, case, accumulation)[0]
    assert_equal(got, factoring.CASES[case].expected)


@pytest.mark.parametrize(
    ("case", "stage"), slow_but(itertools.product(CASES, STAGES), [("sltrain, restarts", 1), ("switchlora", 3)])
)
def test_resume_is_bitwise(ranks, case, stage, tmp_path):
    assert ranks(2).run("tests.deepspeed.factoring:resume", stage, case, str(tmp_path / "check point")) == [[], []]


@pytest.mark.parametrize(
    ("case", "stage"), slow_but(itertools.product(CASES, STAGES), [("cola", 2), ("switchlora", 3)])
)
def test_bf16_stays_close(ranks, case, stage):
    got = ranks(2).run("tests.deepspeed.factoring:train", stage, case, bf16={"enabled": True})[0]
    assert_equal(got, factoring.CASES[case].expected, 5e-2)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_merge_of_relora_really_zeroes_the_moments(ranks, stage):
    run = ranks(3).run
    for case, least in (("relora, magnitude", 0.8), ("relora, random", 0.7), ("relora, reset", 1.0)):
        for shares in run("tests.deepspeed.factoring:zeroed", stage, case, 4):
            assert all(least - 0.03 < share <= min(1.0, least + 0.15) for share in shares.values()), (case, shares)


@pytest.mark.parametrize(
    ("rounding", "stage"),
    slow_but(itertools.product(("stochastic", "remainder"), (2, 3)), [("stochastic", 2), ("remainder", 3)]),
)
def test_resume_of_rounded_merges_is_bitwise(ranks, stage, rounding, tmp_path):
    changes = {"bf16": {"enabled": True}, "section": {"merge_rounding": rounding}}
    different = ranks(2).run("tests.deepspeed.factoring:resume", stage, "relora, magnitude", str(tmp_path), **changes)
    assert different == [[], []]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("case", ["lora, refactorized", "cola", "mora, rotated"])
def test_a_rule_on_the_factors_gives_the_same_however_cut(ranks, case, stage):
    alone = ranks(1).run("tests.deepspeed.factoring:train", 0, case, rule="Muon")[0]
    got = ranks(3).run("tests.deepspeed.factoring:train", stage, case, rule="Muon")[0]
    assert_equal(got, alone)
