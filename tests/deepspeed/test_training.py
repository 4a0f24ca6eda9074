"""Low-rank training under DeepSpeed against one plain process, tensor by tensor: once a stage, and each class of its.

tests/world has all rules, resets and layouts; the rest of the product is slow here.
"""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

import megalr
from megalr.config.settings import MegalrConfig
from megalr.layers import densify
from tests.covering import slow_but
from tests.deepspeed import training
from tests.reference import Recipe, Reference

pytestmark = pytest.mark.distributed
STAGES = (0, 1, 2, 3)
WORLDS = (1, 2, 3)


@functools.cache
def reference_weights(scope: str = "factors", moments: str = "reset", steps: int = 20) -> dict[str, torch.Tensor]:
    """What tests/reference.py makes of the same model, data and recipe."""
    model = training.dense_model()
    megalr.parametrize(model, {"megalr": training.MEGALR}, other_optimizer=True)
    recipe = Recipe(
        lr=lambda step: training.ADAMW["lr"],
        embedding_lr=lambda step: training.ADAMW["embedding"]["lr"],
        weight_decay=training.ADAMW["weight_decay"],
        clip=training.CLIPPING,
        refactorize_every=training.MEGALR["refactorization"]["interval"],
        refactorization_resets=moments == "reset",
        reset_every=training.MEGALR["momentum_reset"]["interval"],
        reset_all=scope == "all",
        ramp_steps=training.MEGALR["momentum_reset"]["warmup_steps"],
    )
    reference = Reference(model, recipe)
    for ids in training.batches(steps):
        reference.step([ids])
    weights = {name: p.detach() for name, p in model.named_parameters()}
    return densify(weights, MegalrConfig.from_json({"megalr": training.MEGALR}).parametrization)


def relative_errors(got, expected):
    """Of every tensor, in 2-norm; factors as their product, since singular vectors have no sign of their own."""
    assert got.keys() == expected.keys()
    return {name: ((got[name] - w).norm() / w.norm()).item() for name, w in expected.items()}


def assert_same_weights(got, expected, tolerance=1e-4):
    errors = relative_errors(got, expected)
    worst = max(errors, key=errors.get)
    assert errors[worst] < tolerance, f"{worst}: {errors[worst]:.1e}"


@pytest.mark.parametrize(
    ("world", "stage", "accumulation"),
    slow_but(itertools.product(WORLDS, STAGES, (1, 4)), [(2, 0, 1), (2, 1, 4), (2, 2, 1), (2, 3, 4)]),
)
def test_equals_one_plain_process(ranks, world, stage, accumulation):
    got = ranks(world).run("tests.deepspeed.training:train", stage, accumulation)[0]
    assert_same_weights(got, reference_weights())


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_reset_of_all_parameters_equals_one_plain_process(ranks, stage):
    section = {**training.MEGALR, "momentum_reset": {"interval": 9, "scope": "all", "warmup_steps": 4}}
    got = ranks(2).run("tests.deepspeed.training:train", stage, megalr=section)[0]
    assert_same_weights(got, reference_weights(scope="all"))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("moments", ["transport", "keep"])
def test_moments_of_refactorized_factors_are_the_same_however_cut(ranks, stage, moments):
    """Against one process of ours: kept moments depend on the signs of singular vectors, which no theory fixes."""
    section = {**training.MEGALR, "refactorization": {"interval": 7, "moments": moments}}
    alone = ranks(1).run("tests.deepspeed.training:train", 0, megalr=section)[0]
    got = ranks(3).run("tests.deepspeed.training:train", stage, megalr=section)[0]
    assert_same_weights(got, alone)
    assert max(relative_errors(got, reference_weights(moments="reset")).values()) > 1e-3  # it does something


LAYOUTS = {
    "round_robin_gradients": (2, {"round_robin_gradients": True}),
    "parameter_alignment": (2, {"parameter_alignment": True}),
    "no overlap, no contiguous gradients": (1, {"overlap_comm": False, "contiguous_gradients": False}),
    "sub-groups smaller than a pair": (3, {"sub_group_size": 150}),
    "persistent parameters": (3, {"stage3_param_persistence_threshold": 1000}),
    "optimizer on the CPU, stage 1": (1, {"offload_optimizer": {"device": "cpu"}}),
    "optimizer on the CPU, stage 2": (2, {"offload_optimizer": {"device": "cpu"}}),
    "optimizer on the CPU, stage 3": (3, {"offload_optimizer": {"device": "cpu"}}),
}


# The others are daily in test_rules.py; here pairs are cut between buffers, and masters of stepped ones change again.
@pytest.mark.parametrize(
    "layout",
    slow_but(LAYOUTS, ["round_robin_gradients", "sub-groups smaller than a pair", "optimizer on the CPU, stage 2"]),
)
def test_layout_variants(ranks, layout):
    stage, zero = LAYOUTS[layout]
    got = ranks(2).run("tests.deepspeed.training:train", stage, zero_optimization={"stage": stage, **zero})[0]
    assert_same_weights(got, reference_weights())


@pytest.mark.parametrize(
    ("world", "stage"), slow_but(itertools.product(WORLDS, STAGES), [(2, stage) for stage in STAGES])
)
def test_refactorization_changes_the_factors_and_nothing_else(ranks, world, stage):
    report = ranks(world).run("tests.deepspeed.training:refactorize_once", stage)[0]
    assert report["product"] < 1e-5
    assert report["balance"] < 1e-5
    assert report["logits"] < 1e-4
    assert report["moved"] > 0.1
    assert report["published"] == 0.0
    # The shapes are odd enough that a boundary does cut factors, in mid-row.
    assert world == 1 or report["cut_factors"] > 0


BF16 = {
    "stage 0": (0, {}),
    "stage 1": (1, {}),
    "stage 1, fp32 accumulation": (1, {"data_types": {"grad_accum_dtype": "fp32"}}),
    "stage 2": (2, {}),
    "stage 3": (3, {}),
}


@pytest.mark.parametrize("case", BF16)
def test_refactorization_of_bf16_weights(ranks, case):
    """The fp32 masters are refactorized exactly; logits move by bf16 rounding of the new factors."""
    stage, more = BF16[case]
    report = ranks(2).run("tests.deepspeed.training:refactorize_once", stage, bf16={"enabled": True}, **more)[0]
    assert report["product"] < 1e-5 and report["balance"] < 1e-5
    assert report["published"] == 0.0
    assert report["logits"] < 1e-2


@pytest.mark.parametrize("case", BF16)
def test_updates_are_counted_exactly(ranks, case):
    stage, more = BF16[case]
    for dtype in ({}, {"bf16": {"enabled": True}}):
        if more and not dtype:
            continue
        counts = ranks(2).run("tests.deepspeed.training:count_updates", stage, 3, **dtype, **more)
        assert counts == [[3, 3, 3]] * 2


@pytest.mark.parametrize("stage", slow_but(STAGES, [1, 3]))
def test_resume_is_bitwise(ranks, stage, tmp_path):
    different = ranks(2).run("tests.deepspeed.training:resume", stage, str(tmp_path / "check point"))
    assert different == [[], []]


def test_resume_is_bitwise_in_bf16(ranks, tmp_path):
    different = ranks(2).run("tests.deepspeed.training:resume", 2, str(tmp_path), bf16={"enabled": True})
    assert different == [[], []]
