"""Rules with compressed activations under DeepSpeed against one plain process, tensor by tensor."""

from __future__ import annotations

import itertools

import pytest

from tests.covering import slow_but
from tests.equality import ACCUMULATIONS, STAGES, WORLDS, assert_equal
from tests.references.parametrizations import velora

pytestmark = pytest.mark.distributed
MEGALR = {"activations": velora.SECTION}
CASES = {case.optimizer["type"]: case for case in velora.CASES.values()}  # by rule


@pytest.mark.parametrize(
    ("rule", "stage", "world", "accumulation"),
    slow_but(itertools.product(CASES, STAGES, WORLDS, ACCUMULATIONS), [("GaLoreAdamW", 3, 2, 4)]),
)
def test_equals_one_plain_process(ranks, rule, stage, world, accumulation):
    run = ranks(world).run
    got, _ = run("tests.deepspeed.rule_training:train_rule", stage, rule, accumulation, megalr=MEGALR)[0]
    assert_equal(got, CASES[rule].expected)


@pytest.mark.parametrize("stage", slow_but((2, 3), [3]))
def test_resume_is_bitwise(ranks, stage, tmp_path):
    folder = str(tmp_path / "check point")
    different = ranks(2).run("tests.deepspeed.rule_training:resume", stage, "GaLoreAdamW", folder, megalr=MEGALR)
    assert different == [[], []]
