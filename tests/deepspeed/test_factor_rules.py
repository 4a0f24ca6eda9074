"""Rules on low-rank factors, with refactorization and momentum reset, against one plain PyTorch process."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch

import megalr
from megalr.config.settings import MegalrConfig
from megalr.layers import densify
from tests.deepspeed import training
from tests.deepspeed.test_training import assert_same_weights, relative_errors
from tests.reference import Recipe, Reference

pytestmark = pytest.mark.distributed
TRAIN = "tests.deepspeed.training:train"
STEPS = 20
# Resets of their own at update 12, between those of the optimizer at 7, 9, 14 and 18.
RULES: dict[str, dict[str, Any]] = {
    "StableSPAM": {"reset_interval": 12, "total_steps": 15},
    "SPAM": {"reset_interval": 12, "warmup_steps": 4, "eps": 1e-8},
    "AdamMini": {},
    # Nothing is corrected for bias: the updates after a reset are tenfold, and at AdamW's rate the run is chaotic.
    "CAME": {"lr": 1e-4},
    "Muon": {},
    "SCALE": {},
    "BAdam": {"switch_interval": 4},  # either layer's turn has two resets in it
}


def optimizer_of(name: str) -> dict[str, Any]:
    return {"type": name, "params": {**training.ADAMW, **RULES[name]}}


@functools.cache
def reference_weights(name: str, scope: str = "factors") -> dict[str, torch.Tensor]:
    model = training.dense_model()
    megalr.parametrize(model, {"megalr": training.MEGALR})
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


def is_covered(name: str, stage: int, world: int) -> bool:
    """The selection for every day: Stable-SPAM everywhere, of the others one world at stage 3 and at one other."""
    i = list(RULES).index(name)
    return name == "StableSPAM" or (stage in (3, i % 3) and world == (stage + i) % 3 + 1)


COMBINATIONS = [
    pytest.param(*c, marks=() if is_covered(*c) else pytest.mark.slow)
    for c in itertools.product(RULES, (0, 1, 2, 3), (1, 2, 3))
]


@pytest.mark.parametrize(("name", "stage", "world"), COMBINATIONS)
def test_equals_one_plain_process(ranks, name, stage, world):
    got = ranks(world).run(TRAIN, stage, steps=STEPS, optimizer=optimizer_of(name))[0]
    assert_same_weights(got, reference_weights(name))


@pytest.mark.parametrize("stage", [0, 3])
def test_reset_of_all_parameters_equals_one_plain_process(ranks, stage):
    section = {**training.MEGALR, "momentum_reset": {**training.MEGALR["momentum_reset"], "scope": "all"}}
    got = ranks(2).run(TRAIN, stage, steps=STEPS, optimizer=optimizer_of("StableSPAM"), megalr=section)[0]
    assert_same_weights(got, reference_weights("StableSPAM", scope="all"))
    assert max(relative_errors(got, reference_weights("StableSPAM")).values()) > 1e-3  # it does something


@pytest.mark.parametrize(
    "stage", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow), 3]
)
def test_resume_is_bitwise(ranks, stage, tmp_path):
    """In the middle of a ramp, with statistics of another age than the moments."""
    different = ranks(2).run(
        "tests.deepspeed.rule_training:resume_factors", stage, str(tmp_path), optimizer=optimizer_of("StableSPAM")
    )
    assert different == [[], []]


@pytest.mark.parametrize("name", ["GaLoreAdamW", "FiraAdamW", "APOLLO", "LDAdamW"])
def test_projected_rules_are_refused_with_the_reason(name):
    config = {"optimizer": {"type": name}, "megalr": training.MEGALR}
    with pytest.raises(megalr.UserError, match=".*what such layers train is small already.*AdamW"):
        MegalrConfig.from_json(config)


def test_transport_of_moments_is_refused():
    section = {**training.MEGALR, "refactorization": {"interval": 7, "moments": "transport"}}
    with pytest.raises(megalr.UserError, match='carries AdamW\'s moments: write "reset" or "keep"'):
        MegalrConfig.from_json({"optimizer": optimizer_of("StableSPAM"), "megalr": section})
