"""The engine of tests/world is like DeepSpeed: the same layouts, and the same weights after training."""

from __future__ import annotations

import functools

import pytest

from megalr.layout.planned import planned_layout
from tests.deepspeed.comparing import train_rule
from tests.equality import assert_equal, rule_case
from tests.world.training import train

pytestmark = pytest.mark.distributed
# Of each stage another rule, with something to bring to every rank: a basis, a matrix's norm, momentum.
RULES = {0: "GaLoreAdamW", 1: "Muon", 2: "FiraAdamW", 3: "AdaRankGrad"}
CLOSE = 1e-5


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("stage", RULES)
def test_layouts_and_weights_are_deepspeeds(ranks, stage, size):
    module = functools.partial(ranks(size).run, f"{train_rule.__module__}:{train_rule.__name__}")
    for weights, layout, groups in module(RULES[stage], stage):
        planned = planned_layout(groups, stage=stage, world_size=size)
        assert dict(layout.shapes) == dict(planned.shapes)
        assert sorted(layout.fragments) == sorted(planned.fragments)
        if weights is not None:
            got = train(rule_case(RULES[stage]), stage, size)[0].weights
            assert_equal(got, weights, CLOSE)
