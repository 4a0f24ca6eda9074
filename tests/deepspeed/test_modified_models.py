"""A model that somebody changes after the engine was made: noticed on all ranks, and weights can be adopted."""

from __future__ import annotations

import pytest

from tests.covering import slow_but
from tests.deepspeed.modifying import BF16
from tests.deepspeed.test_training import relative_errors

pytestmark = pytest.mark.distributed
MODIFYING = "tests.deepspeed.modifying"
PERSISTENT = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 10_000}}
DTYPES = {"fp32": {}, "bf16": BF16}

# By change: how the message begins, and whom it names.
WORDS = {
    "freeze": ("frozen after the engine was made: mlp_tall.weight.", "Freeze before initialize"),
    "freeze_on_one_rank": ("frozen after the engine was made: norm.bias.", "(seen on rank 1"),
    "unfreeze": ("trained by nobody, and missing from checkpoints: mlp_square.weight.", "initialize again"),
    "add": ("trained by nobody, and missing from checkpoints: extra.weight.", "initialize again"),
    "remove": ("trained, but no longer in the model: mlp_tall.bias.", "Put it back"),
    "replace": ("trained by nobody, and missing from checkpoints: norm.weight.", "p.data.copy_"),
    "untie": ("trained by nobody, and missing from checkpoints: lm_head.weight.", "initialize again"),
    "tie": ("trained, but no longer in the model: mlp_tall.bias.", "Put it back"),
    "cast": ("in other memory or of another dtype than when the engine was made,", "mlp_wide.weight, "),
    "reassign": ("in other memory or of another dtype than when the engine was made,", "p.data = ...: norm.weight."),
    "write": ("written since the last update: mlp_wide.weight.", "megalr.adopt_weights(engine)"),
    "write_data": ("written since the last update: norm.weight.", "megalr.adopt_weights(engine)"),
    "write_on_one_rank": ("written since the last update: ", "alone)"),
}


@pytest.mark.parametrize(
    ("stage", "dtype", "world_size"),
    [(stage, dtype, 2) for stage in (0, 1, 2, 3) for dtype in DTYPES] + [(1, "bf16", 3), (3, "fp32", 3)],
)
def test_every_change_is_refused_on_all_ranks_before_it_is_undone_in_silence(ranks, tmp_path, stage, dtype, world_size):
    results = ranks(world_size).run(f"{MODIFYING}:changed", stage, str(tmp_path / "saved"), **DTYPES[dtype])
    found = results[0]
    for other in results[1:]:
        assert {**other, "moved": []} == {**found, "moved": []}
    # Where masters are the weights, what is written is what is trained.
    trains_at_once = {"write", "write_data", "write_on_one_rank"} if (stage, dtype) == (0, "fp32") else set()
    # Elsewhere than in what gathers it, a weight of stage 3 is nothing that one could write.
    elsewhere = {"write_on_one_rank"} if stage == 3 else set()
    for change, (begins, names) in WORDS.items():
        if change in trains_at_once | elsewhere:
            assert found[change] == ""
        elif (stage, change) == (3, "reassign"):
            assert found[change].startswith("written since the last update: norm.weight.")
        else:
            assert found[change].startswith(begins) and names in found[change], change
    assert found["undone"] == ""
    assert found["saved"] == found["consolidated"] == found["unfreeze"]
    assert found["files"] == []
    assert found["at backward"] == found["freeze_on_one_rank"]
    assert found["at step"] == found["write"]
    for each in results:
        assert bool(each["moved"]) is bool(trains_at_once)
        assert each["updates"] == 4


def test_what_stage_3_keeps_gathered_may_be_written_too(ranks, tmp_path):
    for found in ranks(2).run(f"{MODIFYING}:changed", 3, str(tmp_path / "saved"), **PERSISTENT):
        assert found["write_on_one_rank"].startswith(WORDS["write_on_one_rank"][0])
        assert found["undone"] == ""


WAYS = [
    *((stage, dtype, way) for stage in (0, 1, 2, 3) for dtype in DTYPES for way in ("opened", "tensors", "masters")),
]


@pytest.mark.parametrize(
    ("stage", "dtype", "way"),
    slow_but(
        [case for case in WAYS if case[0] > 0 or case[2] != "masters"],
        [
            (0, "bf16", "opened"),
            (1, "bf16", "tensors"),
            (2, "fp32", "opened"),
            (3, "bf16", "opened"),
            (3, "fp32", "masters"),
        ],
    ),
)
def test_adopted_weights_are_trained_on(ranks, stage, dtype, way):
    (wrong, got), *others = ranks(2).run(f"{MODIFYING}:adopted", stage, way, **DTYPES[dtype])
    assert wrong == []
    assert [each for each, _ in others] == [[]]
    if dtype == "fp32" and way == "opened":
        # At stage 0 it is enough to write.
        _, expected = ranks(2).run(f"{MODIFYING}:adopted", 0, way)[0]
        assert max(relative_errors(got, expected).values()) < 1e-5


def test_weights_that_stage_3_keeps_gathered_are_adopted(ranks):
    for wrong, _ in ranks(3).run(f"{MODIFYING}:adopted", 3, "in place", **PERSISTENT, **BF16):
        assert wrong == []


@pytest.mark.parametrize("stage", [2, pytest.param(0, marks=pytest.mark.slow)])
def test_adoptions_that_are_refused_change_nothing(ranks, stage):
    results = ranks(2).run(f"{MODIFYING}:refused_adoptions", stage)
    found = results[0]
    assert results == [found] * 2
    assert "mlp_wide.wight: (20, 37) -> none" in found["name"]
    assert "mlp_wide.weight: (37, 20) -> (20, 37)" in found["shape"]
    assert "rank 1: " in found["ranks"] and "Write the same on every rank" in found["ranks"]
    assert found["begun"].startswith("an update has begun: 1 of its 2 micro-batches")
    assert found["changed"] == ""


@pytest.mark.parametrize(
    ("stage", "dtype"),
    slow_but([(s, d) for s in (0, 1, 2, 3) for d in DTYPES], [(0, "bf16"), (1, "bf16"), (2, "fp32"), (3, "fp32")]),
)
def test_a_weight_may_be_frozen_until_the_engine_is_made(ranks, stage, dtype):
    for found in ranks(2).run(f"{MODIFYING}:frozen_late", stage, **DTYPES[dtype]):
        assert (found["before"], found["still"], found["missing"]) == ("", True, [])
        if (stage, dtype) == (0, "fp32"):
            assert found["after"] == ""  # the masters are the weights, and none has been updated
        else:
            assert found["after"].startswith("frozen after the engine was made: mlp_wide.weight.")


@pytest.mark.parametrize("stage", [0, 1, pytest.param(2, marks=pytest.mark.slow), 3])
def test_a_load_takes_the_place_of_what_was_written(ranks, tmp_path, stage):
    for found in ranks(2).run(f"{MODIFYING}:loaded", stage, str(tmp_path)):
        assert found == ["", "written since", "", "written since"] * 2


@pytest.mark.parametrize(
    ("stage", "parametrization"),
    [
        pytest.param(0, None, marks=pytest.mark.slow),
        (0, {"type": "low_rank", "rank": 5}),
        pytest.param(1, {"type": "projected", "rank": 5, "update_proj_gap": 2}, marks=pytest.mark.slow),
        pytest.param(2, {"type": "low_rank", "rank": 5}, marks=pytest.mark.slow),
        (3, {"type": "projected", "rank": 5, "update_proj_gap": 2}),
        pytest.param(3, None, marks=pytest.mark.slow),
    ],
)
def test_tensor_parallel_ranks_adopt_weights(ranks, stage, parametrization):
    for wrong, words in ranks(4).run(f"{MODIFYING}:adopted_tensor", stage, parametrization):
        assert wrong == []
        assert words.startswith("frozen after the engine was made: ")
        assert words.endswith("(seen on rank 3 alone)")
