"""Factors that a job freezes before the engine is made, and parameters that engines take in another way than torch."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.covering import slow_but
from tests.deepspeed import freezing
from tests.equality import assert_equal

pytestmark = pytest.mark.distributed
WORKER = "tests.deepspeed.freezing"
GALORE = {"type": "GaLoreAdamW", "params": {"lr": 1e-2, "rank": 2, "target_modules": ["up"]}}


@pytest.mark.parametrize(
    ("method", "what", "stage"),
    slow_but(
        [
            *itertools.product(freezing.METHODS, ("block", "teacher"), (0, 2, 3)),
            *itertools.product(("low_rank", "sltrain", "lora"), ("factor",), (0, 2, 3)),
        ],
        [("low_rank", "block", 3), ("sltrain", "teacher", 2), ("low_rank", "factor", 2)],
    ),
)
def test_what_is_frozen_stays_and_the_rest_is_trained_as_by_one_process(ranks, tmp_path, method, what, stage):
    (got, lost), *_ = ranks(2).run(f"{WORKER}:train", method, what, stage, str(tmp_path / "saved"))
    expected = freezing.plain(method, what)
    assert_equal({name: weight for name, weight in got.items() if name in expected}, expected)
    assert lost == []
    frozen = freezing.still(method, what)
    assert frozen
    for name, weight in frozen.items():
        assert torch.equal(got[name], weight) and torch.equal(expected[name], weight), name


@pytest.mark.parametrize(
    ("stage", "optimizer"),
    [(1, GALORE), (2, GALORE), pytest.param(0, GALORE, marks=pytest.mark.slow)],
)
def test_a_parameter_without_elements_makes_no_group(ranks, tmp_path, stage, optimizer):
    results = ranks(2).run(f"{WORKER}:train_empty", stage, optimizer, str(tmp_path / "saved"))
    assert results == [(["matrices", "embedding", "norm"], [])] * 2


@pytest.mark.parametrize("trained", [True, False])
def test_a_parameter_without_dimensions_is_refused_before_anything_is_changed(ranks, trained):
    for way in ("initialize", "build_optimizer"):
        for said, unchanged in ranks(2).run(f"{WORKER}:scalars", way, trained=trained):
            assert said.startswith("odd has no dimensions, its shape is (),") and unchanged
            assert "make it one of shape (1,), as in torch.nn.Parameter(p.detach().reshape(1))" in said


def test_deepspeed_takes_no_parameter_without_dimensions(ranks):
    """The reason for the refusal: should DeepSpeed take them one day, it can go."""
    for said, _ in ranks(1).run(f"{WORKER}:scalars", "plain", trained=True):
        assert "self.dim() cannot be 0 to view" in said


def test_a_schedule_that_looks_at_a_metric_gets_one(ranks):
    """DeepSpeed would hand it the batch size, and the learning rate would fall for nothing."""
    for said, moved, _ in ranks(2).run(f"{WORKER}:metric", None):
        assert 'call engine.step(lr_kwargs={"metrics": loss})' in said and moved == 0
    for said, moved, rate in ranks(2).run(f"{WORKER}:metric", {"metrics": 1.0}):
        assert said == "" and moved != 0 and rate < 1e-2
