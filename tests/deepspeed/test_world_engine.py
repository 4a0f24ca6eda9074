"""The engine of tests/world is like DeepSpeed: the same layouts, and the same weights after training."""

from __future__ import annotations

import pytest

from megalr.config.settings import MegalrConfig
from megalr.layout.planned import planned_layout
from megalr.optim.groups import parameter_groups
from tests.equality import assert_equal, rule_case
from tests.world.training import train

pytestmark = pytest.mark.distributed
# Of each stage another rule, with something to bring to every rank: a basis, a matrix's norm, momentum.
RULES = {0: "GaLoreAdamW", 1: "Muon", 2: "FiraAdamW", 3: "AdaRankGrad"}
CLOSE = 1e-5


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("stage", RULES)
def test_layouts_and_weights_are_deepspeeds(ranks, stage, size):
    case = rule_case(RULES[stage])
    groups = parameter_groups(case.model(), MegalrConfig.from_json({"optimizer": dict(case.optimizer)}).optimizer)
    shapes = [{name: tuple(p.shape) for name, p in group.parameters.items()} for group in groups]
    planned = planned_layout(shapes, stage=stage, world_size=size)
    results = ranks(size).run("tests.deepspeed.comparing:train_rule", RULES[stage], stage)
    for _, layout in results:
        assert dict(layout.shapes) == dict(planned.shapes)
        assert sorted(layout.fragments) == sorted(planned.fragments)
    assert_equal(train(case, stage, size)[0].weights, results[0][0], CLOSE)
