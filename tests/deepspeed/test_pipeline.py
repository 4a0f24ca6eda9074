"""Pipeline stages: each has a data-parallel group of its own, in which the rules see whole matrices."""

from __future__ import annotations

import math

import pytest

from tests.deepspeed import pipelining, rule_training
from tests.deepspeed.test_rules import assert_same_weights
from tests.plain_training import plain_training

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("optimizer", ["GaLoreAdamW", "Muon"])
@pytest.mark.parametrize("stage", [0, 1])
def test_two_stages_equal_one_process(ranks, stage, optimizer):
    """Gradients are clipped by the norm of the whole model."""
    results = ranks(4).run("tests.deepspeed.pipelining:train", stage, optimizer)
    got = {name: w for weights in results if weights is not None for name, w in weights.items()}
    assert_equals_one_process(got, optimizer)


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("ill", [0, 1])
def test_an_update_that_one_stage_skips_is_skipped_by_all(ranks, stage, ill):
    """Without clipping, whose norm would tell the others."""
    results = ranks(4).run("tests.deepspeed.pipelining:train", stage, "Muon", ill, 0.0)
    got = {name: w for weights in results if weights is not None for name, w in weights.items()}
    assert_equals_one_process(got, "Muon", clip=math.inf)


def assert_equals_one_process(got, optimizer, clip=pipelining.CLIPPING):
    data = rule_training.batches(rule_training.STEPS)
    del data[pipelining.ILL]
    expected = plain_training(pipelining.Plain(), data, optimizer, pipelining.settings(optimizer), clip=clip)
    assert got.keys() == expected.keys()
    assert_same_weights(got, expected)


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("how", ["topology", "autotp_size"])
def test_tensor_parallel_layers_are_refused(ranks, stage, how):
    for message in ranks(4).run("tests.deepspeed.pipelining:refused", stage, how):
        assert "tensor parallelism together with pipeline stages is not supported" in message


def test_guards_are_refused(ranks):
    for message in ranks(4).run("tests.deepspeed.pipelining:refused", 0, "guards"):
        assert "guards do not see the losses and steps of pipeline engines: leave megalr.guards out" in message


def test_stages_that_zero_would_wait_for_are_refused(ranks):
    for message in ranks(4).run("tests.deepspeed.pipelining:refused", 1, "uneven"):
        assert "pipeline stages have 1 and 2 groups of parameters" in message
        assert "use ZeRO stage 0" in message
    assert ranks(4).run("tests.deepspeed.pipelining:refused", 0, "uneven") == [""] * 4


def test_rules_that_stages_would_run_otherwise_are_refused(ranks):
    for message in ranks(4).run("tests.deepspeed.pipelining:refused", 0, "block"):
        assert message == "BAdam does not work with pipeline stages: each stage would have an active block of its own"
    for message in ranks(4).run("tests.deepspeed.pipelining:refused", 0, "tied"):
        assert "pipeline stages share " in message and 'write "stagger": false in optimizer.params' in message
