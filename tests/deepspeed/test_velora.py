"""Rules with compressed activations under DeepSpeed against one plain process, tensor by tensor."""

from __future__ import annotations

import functools

import pytest

from tests.deepspeed import rule_training, training
from tests.deepspeed.test_training import assert_same_weights
from tests.odd_model import odd_model
from tests.plain_training import plain_training
from tests.plain_velora import with_velora

pytestmark = pytest.mark.distributed
SECTION = {"type": "velora", "groups": 10, "scale": 0.7, "target_modules": ["mlp_tall", "mlp_square"]}
MEGALR = {"activations": SECTION}
RULES = ("AdamW", "GaLoreAdamW", "Muon")


@functools.cache
def reference(rule: str):
    model = with_velora(odd_model(), SECTION)
    data = rule_training.batches(rule_training.STEPS)
    return plain_training(model, data, rule, rule_training.RULES[rule], clip=training.CLIPPING)


COVERING = [("GaLoreAdamW", 3, 3, 4), ("Muon", 1, 2, 1), ("AdamW", 2, 2, 4), ("AdamW", 0, 3, 1)]
ALL = [(r, s, w, n) for r in RULES for s in (0, 1, 2, 3) for w in (1, 2, 3, 4) for n in (1, 4)]
REST = [pytest.param(*row, marks=pytest.mark.slow) for row in ALL if row not in COVERING]


@pytest.mark.parametrize(("rule", "stage", "world", "accumulation"), [*COVERING, *REST])
def test_equals_one_plain_process(ranks, rule, stage, world, accumulation):
    run = ranks(world).run
    got, _ = run("tests.deepspeed.rule_training:train_rule", stage, rule, accumulation, megalr=MEGALR)[0]
    assert_same_weights(got, reference(rule))


@pytest.mark.parametrize("stage", [2, 3])
def test_resume_is_bitwise(ranks, stage, tmp_path):
    folder = str(tmp_path / "check point")
    different = ranks(2).run("tests.deepspeed.rule_training:resume", stage, "GaLoreAdamW", folder, megalr=MEGALR)
    assert different == [[], []]
