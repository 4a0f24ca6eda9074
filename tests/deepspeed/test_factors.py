"""Layers with factors under DeepSpeed against one plain process, tensor by tensor."""

from __future__ import annotations

import functools

import pytest

from tests.deepspeed import factoring, rule_training, training
from tests.deepspeed.test_training import assert_same_weights
from tests.odd_model import odd_model
from tests.plain_factors import plain_factors

pytestmark = pytest.mark.distributed
STAGES = (0, 1, 2, 3)
WORLDS = (1, 2, 3, 4)
CASES = list(factoring.CASES)


@functools.cache
def reference(case: str):
    """What tests/plain_factors.py makes of the same model, data and recipe."""
    section, sections = factoring.CASES[case]
    restarts = {}
    if "refactorization" in sections:
        restarts["refactorize_every"] = sections["refactorization"]["interval"]
    if "momentum_reset" in sections:
        restarts["reset_every"] = sections["momentum_reset"]["interval"]
        restarts["warmup"] = sections["momentum_reset"]["warmup_steps"]
    data = rule_training.batches(factoring.STEPS)
    section = {**section, "restarts": restarts}
    rule = factoring.RULES.get(case)
    return plain_factors(odd_model(), data, section, factoring.ADAMW, clip=training.CLIPPING, rule=rule)


# Each case cut by stage 3 and at one other stage; all other combinations are for the slow selection.
COVERING = [(case, 3, 3, 1) for case in CASES] + [(case, i % 3, 2, 4) for i, case in enumerate(CASES)]
ALL = [(case, stage, world, steps) for case in CASES for stage in STAGES for world in WORLDS for steps in (1, 4)]
REST = [pytest.param(*row, marks=pytest.mark.slow) for row in ALL if row not in COVERING]


# Of the checks that take two runs, one stage each of these is for the fast selection.
DAILY = ("sltrain, restarts", "relora, magnitude", "cola", "mora, rotated", "loro", "switchlora", *factoring.RULES)


def mostly_slow(shift: int):
    """Each case with each stage; all but one stage of some cases are for the slow selection."""
    rows = [(case, stage, (i + shift) % 4) for i, case in enumerate(CASES) for stage in STAGES]
    marks = [[] if stage == daily and case in DAILY else [pytest.mark.slow] for case, stage, daily in rows]
    return [pytest.param(case, stage, marks=m) for (case, stage, _), m in zip(rows, marks, strict=True)]


@pytest.mark.parametrize(("case", "stage", "world", "accumulation"), [*COVERING, *REST])
def test_equals_one_plain_process(ranks, case, stage, world, accumulation):
    got = ranks(world).run("tests.deepspeed.factoring:train", stage, case, accumulation)[0]
    assert_same_weights(got, reference(case))


@pytest.mark.parametrize(("case", "stage"), mostly_slow(1))
def test_resume_is_bitwise(ranks, case, stage, tmp_path):
    assert ranks(2).run("tests.deepspeed.factoring:resume", stage, case, str(tmp_path / "check point")) == [[], []]


@pytest.mark.parametrize(("case", "stage"), mostly_slow(2))
def test_bf16_stays_close(ranks, case, stage):
    got = ranks(2).run("tests.deepspeed.factoring:train", stage, case, bf16={"enabled": True})[0]
    assert_same_weights(got, reference(case), tolerance=5e-2)


@pytest.mark.parametrize("stage", STAGES)
def test_a_merge_of_relora_really_zeroes_the_moments(ranks, stage):
    run = ranks(3).run
    for case, least in (("relora, magnitude", 0.8), ("relora, random", 0.7), ("relora, reset", 1.0)):
        for shares in run("tests.deepspeed.factoring:zeroed", stage, case, 4):
            assert all(least - 0.03 < share <= min(1.0, least + 0.15) for share in shares.values()), (case, shares)


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("rounding", ["stochastic", "remainder"])
def test_resume_of_rounded_merges_is_bitwise(ranks, stage, rounding, tmp_path):
    changes = {"bf16": {"enabled": True}, "section": {"merge_rounding": rounding}}
    different = ranks(2).run("tests.deepspeed.factoring:resume", stage, "relora, magnitude", str(tmp_path), **changes)
    assert different == [[], []]


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("case", ["lora, refactorized", "cola", "mora, rotated"])
def test_a_rule_on_the_factors_gives_the_same_however_cut(ranks, case, stage):
    alone = ranks(1).run("tests.deepspeed.factoring:train", 0, case, rule="Muon")[0]
    got = ranks(3).run("tests.deepspeed.factoring:train", stage, case, rule="Muon")[0]
    assert_same_weights(got, alone)
