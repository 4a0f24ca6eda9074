"""Rules on low-rank factors under DeepSpeed, with refactorization and momentum reset, against one plain process.

tests/world has all of them at every stage; here one is daily.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch

import megalr
from megalr.config.settings import MegalrConfig
from megalr.layers import densify
from tests.covering import slow_but
from tests.deepspeed import training
from tests.deepspeed.test_training import assert_same_weights, relative_errors
from tests.reference import Recipe, Reference
from tests.references import REFERENCES

pytestmark = pytest.mark.distributed
TRAIN = "tests.deepspeed.training:train"
STEPS = 20
RULES: dict[str, dict[str, Any]] = {
    name: dict(reference.on_factors) for name, reference in REFERENCES.items() if reference.on_factors is not None
}


def optimizer_of(name: str) -> dict[str, Any]:
    return {"type": name, "params": {**training.ADAMW, **RULES[name]}}


@functools.cache
def reference_weights(name: str, scope: str = "factors") -> dict[str, torch.Tensor]:
    model = training.dense_model()
    megalr.parametrize(model, {"megalr": training.MEGALR}, other_optimizer=True)
    settings = dict(RULES[name])
    lr = settings.pop("lr", training.ADAMW["lr"])
    recipe = Recipe(
        lr=lambda step: lr,
        embedding_lr=lambda step: training.ADAMW["embedding"]["lr"],
        weight_decay=training.ADAMW["weight_decay"],
        clip=training.CLIPPING,
        refactorize_every=training.MEGALR["refactorization"]["interval"],
        refactorization_resets=True,
        reset_every=training.MEGALR["momentum_reset"]["interval"],
        reset_all=scope == "all",
        ramp_steps=training.MEGALR["momentum_reset"]["warmup_steps"],
        rule=(name, settings),
    )
    reference = Reference(model, recipe)
    for ids in training.batches(STEPS):
        reference.step([ids])
    weights = {n: p.detach() for n, p in model.named_parameters()}
    return densify(weights, MegalrConfig.from_json({"megalr": training.MEGALR}).parametrization)


@pytest.mark.parametrize(
    ("name", "stage", "world"), slow_but(itertools.product(RULES, (0, 1, 2, 3), (1, 2, 3)), [("StableSPAM", 3, 2)])
)
def test_equals_one_plain_process(ranks, name, stage, world):
    got = ranks(world).run(TRAIN, stage, steps=STEPS, optimizer=optimizer_of(name))[0]
    assert_same_weights(got, reference_weights(name))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 3])
def test_reset_of_all_parameters_equals_one_plain_process(ranks, stage):
    section = {**training.MEGALR, "momentum_reset": {**training.MEGALR["momentum_reset"], "scope": "all"}}
    got = ranks(2).run(TRAIN, stage, steps=STEPS, optimizer=optimizer_of("StableSPAM"), megalr=section)[0]
    assert_same_weights(got, reference_weights("StableSPAM", scope="all"))
    assert max(relative_errors(got, reference_weights("StableSPAM")).values()) > 1e-3  # it does something


@pytest.mark.parametrize("stage", slow_but((0, 1, 2, 3), [2]))
def test_resume_is_bitwise(ranks, stage, tmp_path):
    """In the middle of a ramp, with statistics of another age than the moments."""
    different = ranks(2).run(
        "tests.deepspeed.rule_training:resume_factors", stage, str(tmp_path), optimizer=optimizer_of("StableSPAM")
    )
    assert different == [[], []]


def test_transport_of_moments_is_refused():
    section = {**training.MEGALR, "refactorization": {"interval": 7, "moments": "transport"}}
    with pytest.raises(megalr.UserError, match='or Muon\'s momentum: write "reset" or "keep" with'):
        MegalrConfig.from_json({"optimizer": optimizer_of("StableSPAM"), "megalr": section})
