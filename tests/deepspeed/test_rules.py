"""Rules under DeepSpeed against one plain process, tensor by tensor: one a stage, and each thing that DeepSpeed does.

tests/world has every rule under every way of cutting its matrices. Here the rest of the product is slow.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch

from tests.covering import slow_but
from tests.deepspeed import rule_training
from tests.deepspeed.rule_training import batches
from tests.deepspeed.training import CLIPPING
from tests.equality import ACCUMULATIONS, STAGES, WORLDS, calls_of, rule_case
from tests.odd_model import EXPERTS, odd_model
from tests.plain_training import plain_training
from tests.references import OPTIONS, REFERENCES

pytestmark = pytest.mark.distributed
MATRICES = 7 + EXPERTS  # of the odd model
TRAIN = "tests.deepspeed.rule_training:train_rule"


@functools.cache
def plain_weights(
    optimizer: str, variant: tuple[str, ...] = (), params: tuple[tuple[str, Any], ...] = ()
) -> dict[str, torch.Tensor]:
    """What tests/references make of the same model, data and settings."""
    model = odd_model(**dict.fromkeys(variant, True))
    settings = {**rule_training.RULES[optimizer], **dict(params)}
    return plain_training(model, batches(rule_training.STEPS), optimizer, settings, clip=CLIPPING)


def largest_error(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> tuple[float, str]:
    """Relative, in the 2-norm, and of which tensor."""
    return max((((got[n] - w).norm() / w.norm()).item(), n) for n, w in expected.items())


def assert_same_weights(got, expected, tolerance=1e-4):
    error, name = largest_error(got, expected)
    assert error < tolerance, f"{name}: {error:.1e}"


# With micro-batches, of which a rule must see one gradient; tests/deepspeed/test_world_engine.py has others without.
DAILY = [("GaLoreAdamW", 0, 2, 4), ("SCALE", 1, 2, 4), ("LDAdamW", 2, 2, 4), ("BAdam", 3, 2, 4)]


@pytest.mark.parametrize(
    ("optimizer", "stage", "world", "accumulation"),
    slow_but(itertools.product(rule_training.RULES, STAGES, WORLDS, ACCUMULATIONS), DAILY),
)
def test_equals_one_plain_process(ranks, optimizer, stage, world, accumulation):
    results = ranks(world).run(TRAIN, stage, optimizer, accumulation)
    assert_same_weights(results[0][0], plain_weights(optimizer))
    # The rule really ran: once for each active matrix and update, over all ranks; at stage 0 on each of them.
    calls = [counts["calls"] for _, counts in results]
    once = calls_of(rule_case(optimizer))
    assert calls == [once] * world if stage == 0 else sum(calls) == once
    assert [counts["updates"] for _, counts in results] == [rule_training.STEPS] * world


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "title"), OPTIONS)
def test_options(ranks, optimizer, title):
    params = REFERENCES[optimizer].options[title]
    got = ranks(3).run(TRAIN, 3 if title == "full" else 2, optimizer, params=dict(params))[0][0]
    expected = plain_weights(optimizer, params=tuple(params.items()))
    assert_same_weights(got, expected)
    assert largest_error(expected, plain_weights(optimizer))[0] > 1e-3  # it does something


@pytest.mark.slow
@pytest.mark.parametrize("projector", ["eigh", "randomized", "power"])
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_fast_projectors_are_the_same_however_cut(ranks, projector, stage):
    """Against one process of ours: there is no second implementation of them to compare with."""
    alone = ranks(1).run(TRAIN, 0, "GaLoreAdamW", params={"projector": projector})[0][0]
    got = ranks(3).run(TRAIN, stage, "GaLoreAdamW", params={"projector": projector})[0][0]
    assert_same_weights(got, alone)


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "round_robin_gradients": (2, {"zero_optimization": {"round_robin_gradients": True}}),
    "parameter_alignment": (2, {"zero_optimization": {"parameter_alignment": True}}),
    "no overlap": (1, {"zero_optimization": {"overlap_comm": False, "contiguous_gradients": False}}),
    "reduce_scatter off": (2, {"zero_optimization": {"reduce_scatter": False}}),
    "sub-groups smaller than a matrix": (3, {"zero_optimization": {"sub_group_size": 150}}),
    "persistent parameters": (3, {"zero_optimization": {"stage3_param_persistence_threshold": 1000}}),
    "optimizer on the CPU, stage 1": (1, {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}),
    "optimizer on the CPU, stage 2": (2, {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}),
    "optimizer on the CPU, stage 3": (3, {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_variants(ranks, layout):
    stage, changes = LAYOUTS[layout]
    zero = {"stage": stage, **changes.get("zero_optimization", {})}
    got = ranks(2).run(TRAIN, stage, "GaLoreAdamW", **{**changes, "zero_optimization": zero})[0][0]
    assert_same_weights(got, plain_weights("GaLoreAdamW"))


@pytest.mark.parametrize(
    ("variant", "stage"),
    slow_but(itertools.product(("frozen", "unused", "tied"), STAGES), [("frozen", 3), ("unused", 2), ("tied", 1)]),
)
def test_frozen_unused_and_tied_parameters(ranks, stage, variant):
    optimizer = ["GaLoreAdamW", "Muon", "FiraAdamW", "LDAdamW"][stage]
    results = ranks(3).run(TRAIN, stage, optimizer, variant={variant: True})
    assert_same_weights(results[0][0], plain_weights(optimizer, (variant,)))


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("targets", [["narrow"], ["mlp_row"]])
def test_fewer_matrices_than_ranks(ranks, stage, targets):
    params = {"target_modules": targets, "rank": 1}
    results = ranks(4).run(TRAIN, stage, "GaLoreAdamW", params=params)
    expected = plain_weights("GaLoreAdamW", params=(("target_modules", tuple(targets)), ("rank", 1)))
    assert_same_weights(results[0][0], expected)
    calls = [counts["calls"] for _, counts in results]
    matrices = 2 if targets == ["narrow"] else 1
    assert sum(calls) == matrices * rule_training.STEPS * (4 if stage == 0 else 1)


# bf16 weights and gradients round at 2⁻⁹; the masters follow the fp32 run to the accuracy of such gradients.
BF16_TOLERANCE = 0.05


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("optimizer", "params"),
    [
        ("SCALE", {"embeddings": False}),
        ("SCALE", {"head": False}),
        ("Muon", {"head": True, "embeddings": True}),
    ],
)
def test_head_and_embeddings_by_the_rule(ranks, optimizer, params, stage):
    got = ranks(stage + 1).run(TRAIN, stage, optimizer, params=params)[0][0]
    assert_same_weights(got, plain_weights(optimizer, params=tuple(params.items())))


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "world"), [(0, 2), (1, 3), (2, 2), (3, 4)])
def test_a_tied_head_by_the_rule(ranks, stage, world):
    got = ranks(world).run(TRAIN, stage, "SCALE", variant={"tied": True})[0][0]
    assert_same_weights(got, plain_weights("SCALE", ("tied",)))


BF16 = {
    "stage 0": (0, {}),
    "stage 1": (1, {}),
    "stage 2": (2, {}),
    "stage 3": (3, {}),
    "BF16_Optimizer": (1, {"data_types": {"grad_accum_dtype": "fp32"}}),
}


@pytest.mark.parametrize("optimizer", slow_but(("GaLoreAdamW", "Muon"), ["GaLoreAdamW"]))
@pytest.mark.parametrize("case", BF16)
def test_bf16(ranks, optimizer, case):
    stage, more = BF16[case]
    results = ranks(2).run(TRAIN, stage, optimizer, bf16={"enabled": True}, **more)
    assert_same_weights(results[0][0], plain_weights(optimizer), BF16_TOLERANCE)
    assert sum(counts["calls"] for _, counts in results) == MATRICES * rule_training.STEPS * (2 if stage == 0 else 1)


@pytest.mark.parametrize(
    ("optimizer", "stage"),
    slow_but(itertools.product(rule_training.RULES, STAGES), [("GaLoreAdamW", stage) for stage in STAGES]),
)
def test_resume_is_bitwise(ranks, optimizer, stage, tmp_path):
    different = ranks(2).run("tests.deepspeed.rule_training:resume", stage, optimizer, str(tmp_path / "check point"))
    assert different == [[], []]


@pytest.mark.parametrize(
    ("optimizer", "stage", "world"),
    slow_but(
        [(rule, *layout) for rule in ("GaLoreAdamW", "Muon") for layout in ((0, 2), (2, 2), (3, 3))],
        [("GaLoreAdamW", 2, 2), ("Muon", 3, 3)],
    ),
)
def test_resume_is_bitwise_in_bf16_and_with_padding(ranks, optimizer, stage, world, tmp_path):
    different = ranks(world).run(
        "tests.deepspeed.rule_training:resume", stage, optimizer, str(tmp_path), bf16={"enabled": True}
    )
    assert different == [[]] * world


@pytest.mark.parametrize("stage", slow_but(STAGES, [2]))
def test_clipping_acts_on_gradients_not_on_updates(ranks, stage):
    """Muon's update does not depend on the gradient's size, so clipping a hundredfold must not shrink it."""
    run = functools.partial(ranks(2).run, "tests.deepspeed.rule_training:one_update", stage, "Muon")
    clipped, free = run(1e-2)[0], run(1e6)[0]
    start = odd_model().state_dict()
    matrices = [name for name in start if "mlp" in name and "bias" not in name]
    for name in matrices:
        moved, expected = clipped[name] - start[name], free[name] - start[name]
        assert (moved - expected).norm() < 1e-2 * expected.norm(), name


@pytest.mark.parametrize("stage", slow_but((1, 3), [3]))
def test_a_checkpoint_of_other_settings_is_refused(ranks, stage, tmp_path):
    run = functools.partial(ranks(2).run, "tests.deepspeed.rule_training:resume_with", stage, str(tmp_path))
    first, second = run(rank=4)
    assert first == second  # no rank goes on alone
    assert "written with rule galore, rank 5, proj_type std, the configuration has rule galore, rank 4" in first
    # What only steers the training may change, and moves no matrix to another owner.
    assert run(update_proj_gap=200, scale=1.0, projector="power", moments="reset") == ["", ""]
