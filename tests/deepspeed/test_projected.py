"""Projected layers under DeepSpeed against one plain process, tensor by tensor, and what must not disturb them.

tests/world has every setting at every stage. Here are once a stage the full gradients beside DeepSpeed's own, frozen
weights and bases, which stage 3 cuts, and updates that DeepSpeed skips; the rest of the product is slow.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest

from tests.covering import slow_but
from tests.deepspeed import projecting, rule_training, training
from tests.deepspeed.test_training import assert_same_weights, relative_errors
from tests.odd_model import odd_model
from tests.plain_projected import plain_projected

pytestmark = pytest.mark.distributed
STAGES = (0, 1, 2, 3)
WORLDS = (1, 2, 3, 4)
LAYERS = len(projecting.ODD["target_modules"])
# Staggered over five updates, each of the four layers is refreshed at least twice in twelve.
EXPECTED_REFRESHES = sum(len(range(i * 5 // LAYERS, projecting.STEPS, 5)) for i in range(LAYERS))


@functools.cache
def reference(model: str = "odd", clip: float = training.CLIPPING, **section: Any):
    """What tests/plain_projected.py makes of the same model, data and recipe."""
    dense = odd_model() if model == "odd" else training.dense_model()
    section = {**(projecting.ODD if model == "odd" else projecting.LLAMA), **section}
    return plain_projected(dense, rule_training.batches(projecting.STEPS), section, projecting.ADAMW, clip=clip)


@pytest.mark.parametrize(
    ("stage", "world", "accumulation"),
    slow_but(itertools.product(STAGES, WORLDS, (1, 4)), [(0, 2, 4), (1, 2, 1), (2, 2, 4), (3, 2, 4)]),
)
def test_equals_one_plain_process(ranks, stage, world, accumulation):
    results = ranks(world).run("tests.deepspeed.projecting:train", stage, accumulation)
    assert_same_weights(results[0][0], reference())
    assert {refreshes for _, refreshes in results} == {EXPECTED_REFRESHES}


SETTINGS = {
    "std, all at once": {"side": "std", "stagger": False},
    "output": {"side": "output"},
    "transport": {"moments": "transport"},
    "reset": {"moments": "reset"},
    "random": {"projector": "random", "moments": "transport"},
    "random from the sixth update": {"random_from": 6, "moments": "transport"},
    "materialized": {"compute": "materialized"},
    "rematerialized": {"compute": "rematerialized"},
    "low-rank": {"compute": "low_rank"},
}


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_equal_one_plain_process(ranks, setting, stage):
    section = SETTINGS[setting]
    got = ranks(3).run("tests.deepspeed.projecting:train", stage, section=section)[0][0]
    assert_same_weights(got, reference(**section))


@pytest.mark.parametrize(("share", "stage"), slow_but(itertools.product((False, True), STAGES), [(True, 3)]))
def test_llama_equals_one_plain_process(ranks, share, stage):
    section = {"share_basis": share, "rank": 4}
    got, refreshes = ranks(2).run("tests.deepspeed.projecting:train", stage, 4, model="llama", section=section)[0]
    assert_same_weights(got, reference("llama", share_basis=share, rank=4))
    bases = 2 * (4 if share else 7)
    assert refreshes == sum(len(range(i * 5 // bases, 12, 5)) for i in range(bases))


@pytest.mark.slow
@pytest.mark.parametrize("projector", ["power", "randomized", "eigh"])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_projectors_give_the_same_however_cut(ranks, projector, stage):
    """Against one process of ours: the power step's basis is another than the SVD's, the other two are the same."""
    section = {"projector": projector}
    alone = ranks(1).run("tests.deepspeed.projecting:train", 0, section=section)[0][0]
    got = ranks(3).run("tests.deepspeed.projecting:train", stage, section=section)[0][0]
    assert_same_weights(got, alone)
    worst = max(relative_errors(got, reference()).values())
    assert worst > 1e-3 if projector == "power" else worst < 1e-4


@pytest.mark.parametrize("stage", slow_but((1, 3), [1]))
def test_no_clipping_equals_one_plain_process(ranks, stage):
    got = ranks(2).run("tests.deepspeed.projecting:train", stage, gradient_clipping=0.0)[0][0]
    assert_same_weights(got, reference(clip=float("inf")))


LAYOUTS = {
    "round_robin_gradients": (2, {"round_robin_gradients": True}),
    "sub-groups smaller than a matrix": (3, {"sub_group_size": 150}),
    "persistent parameters": (3, {"stage3_param_persistence_threshold": 500}),
    "optimizer on the CPU, stage 2": (2, {"offload_optimizer": {"device": "cpu"}}),
    "optimizer on the CPU, stage 3": (3, {"offload_optimizer": {"device": "cpu"}}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_variants(ranks, layout):
    stage, zero = LAYOUTS[layout]
    got = ranks(2).run("tests.deepspeed.projecting:train", stage, zero_optimization={"stage": stage, **zero})[0][0]
    assert_same_weights(got, reference())


@pytest.mark.slow
def test_sub_groups_that_split_a_shared_basis(ranks):
    section, zero = {"share_basis": True, "rank": 4}, {"stage": 3, "sub_group_size": 100}
    got = ranks(2).run("tests.deepspeed.projecting:train", 3, model="llama", section=section, zero_optimization=zero)
    assert_same_weights(got[0][0], reference("llama", share_basis=True, rank=4))


@pytest.mark.parametrize(
    ("variant", "stage"),
    slow_but(itertools.product(("frozen", "unused", "tied"), STAGES), [("frozen", 3), ("unused", 1)]),
)
def test_frozen_unused_and_tied_parameters(ranks, variant, stage):
    section = {"target_modules": ["mlp_wide", "mlp_tall", "mlp_square", "mlp_experts_back", "mlp_unused"]}
    if variant != "unused":
        section = {}
    model = {variant: True}
    alone = ranks(1).run("tests.deepspeed.projecting:train", 0, variant=model, section=section)[0][0]
    got = ranks(3).run("tests.deepspeed.projecting:train", stage, variant=model, section=section)[0][0]
    assert_same_weights(got, alone)


@pytest.mark.parametrize("stage", slow_but(STAGES, [1]))
def test_resume_is_bitwise(ranks, stage, tmp_path):
    folder = str(tmp_path / "check point")
    assert ranks(2).run("tests.deepspeed.projecting:resume", stage, folder) == [[], []]


@pytest.mark.parametrize("stage", slow_but(STAGES, [0, 3]))
def test_resume_of_bf16_with_remainders_is_bitwise(ranks, stage, tmp_path):
    section = {"merge_rounding": "remainder", "share_basis": True, "moments": "transport"}
    changes = {"bf16": {"enabled": True}, "section": section, "model": "llama"}
    assert ranks(2).run("tests.deepspeed.projecting:resume", stage, str(tmp_path), **changes) == [[], []]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("at", "only_rank"), slow_but(itertools.product((5, 7), (None, 1)), [(5, 1)]))
def test_a_skipped_update_changes_nothing_and_leaves_nothing_behind(ranks, stage, at, only_rank):
    """The layers have added up the bad gradient when the update is skipped, by us at stage 0, else by DeepSpeed."""
    results = ranks(2).run("tests.deepspeed.projecting:poison", stage, at, only_rank)
    data = rule_training.batches(projecting.STEPS)
    del data[at]
    expected = plain_projected(odd_model(), data, projecting.ODD, projecting.ADAMW, clip=training.CLIPPING)
    assert [changed for changed, _, _ in results] == [[], []]
    assert_same_weights(results[0][1], expected)


def test_a_skipped_update_puts_no_refresh_off(ranks):
    """Bases are due at updates 0, 1, 2, 3 of every five. The sixth batch is bad, and update 5 its successor's."""
    for counts in ranks(2).run("tests.deepspeed.projecting:refreshes_without_guard", 5):
        assert counts == [1, 2, 3, 4, 4, 4, 5, 6]


@pytest.mark.parametrize("stage", slow_but((0, 2, 3), [3]))
def test_a_basis_that_is_not_finite_is_not_taken(ranks, stage):
    for finite, refreshes in ranks(2).run("tests.deepspeed.projecting:overflowing", stage):
        assert finite
        assert refreshes == 2 * LAYERS


@pytest.mark.parametrize("stage", [0, 2])
def test_an_update_ends_where_the_user_says(ranks, stage):
    assert ranks(2).run("tests.deepspeed.projecting:manual_boundaries", stage) == [EXPECTED_REFRESHES] * 2


@pytest.mark.parametrize(
    ("rounding", "stage"),
    slow_but(itertools.product(("nearest", "stochastic", "remainder"), STAGES), [("stochastic", 2), ("nearest", 3)]),
)
def test_bf16_stays_close(ranks, rounding, stage):
    changes = {"bf16": {"enabled": True}, "section": {"merge_rounding": rounding}}
    got, refreshes = ranks(2).run("tests.deepspeed.projecting:train", stage, **changes)[0]
    assert_same_weights(got, reference(), tolerance=5e-2)
    assert refreshes == EXPECTED_REFRESHES
