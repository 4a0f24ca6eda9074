"""The examples of a rule and of layers that a user adds, held to what megalr's own are held to."""

from __future__ import annotations

import functools

import pytest
import torch

from tests.deepspeed.plugging import LAYERS, PARAMS, TYPE
from tests.deepspeed.rule_training import STEPS, batches
from tests.deepspeed.test_rules import MATRICES, assert_same_weights
from tests.deepspeed.training import CLIPPING
from tests.odd_model import odd_model
from tests.plain_training import plain_training
from tests.references import REFERENCES
from tests.references.common import Reference

pytestmark = pytest.mark.distributed


class RowNormalizedMomentum(Reference):
    """The example's docstring, a second time."""

    def __init__(self, shape, *, momentum):
        self.M = torch.zeros(shape)
        self.momentum = momentum

    def update(self, G):
        self.M = self.momentum * self.M + (1 - self.momentum) * G
        return torch.nn.functional.normalize(self.M, dim=1)


@functools.cache
def reference():
    REFERENCES[TYPE] = RowNormalizedMomentum
    try:
        return plain_training(odd_model(), batches(STEPS), TYPE, PARAMS, clip=CLIPPING)
    finally:
        del REFERENCES[TYPE]


@pytest.mark.parametrize(("stage", "world", "accumulation"), [(0, 2, 1), (1, 3, 4), (2, 2, 4), (3, 3, 1)])
def test_a_rule_of_ones_own_equals_one_plain_process(ranks, stage, world, accumulation):
    results = ranks(world).run("tests.deepspeed.plugging:train", stage, accumulation)
    assert_same_weights(results[0][0], reference())
    calls = [calls for _, calls, _ in results]
    assert calls == [MATRICES * STEPS] * world if stage == 0 else sum(calls) == MATRICES * STEPS
    assert all(" row_normalized_momentum " in table for _, _, table in results)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_rule_of_ones_own_resumes(ranks, tmp_path, stage):
    for lost in ranks(2).run("tests.deepspeed.plugging:resume", stage, str(tmp_path)):
        assert lost == []


def test_numbers_of_a_rule_of_ones_own_come_back(ranks, tmp_path):
    """Floats, truth values, negative and infinite numbers: by both kinds of checkpoints, also in another layout."""
    results = ranks(2).run("tests.deepspeed.plugging:keep_numbers", 2, 3, str(tmp_path))
    for saved, same_layout, _ in results:
        assert same_layout == saved
    before, after = ({k: v for result in results for k, v in result[which].items()} for which in (0, 2))
    assert before == after and len(before) == 4 * MATRICES
    assert {*map(type, after.values())} == {float, bool, int}


@pytest.mark.parametrize(("rule", "lr"), [("AdamW", 3e-3), ("Muon", 1e-2)])
def test_layers_of_ones_own_train_the_same_however_cut(ranks, rule, lr):
    optimizer = {"type": rule, "params": {"lr": lr}}
    one, cut = (
        ranks(world).run("tests.deepspeed.training:train", stage, steps=12, megalr=LAYERS, optimizer=optimizer)[0]
        for stage, world in ((0, 1), (3, 2))
    )
    assert_same_weights(cut, one)


def test_layers_of_ones_own_resume(ranks, tmp_path):
    for lost in ranks(2).run("tests.deepspeed.training:resume", 3, str(tmp_path), megalr=LAYERS):
        assert lost == []
