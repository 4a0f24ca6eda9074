"""Checkpoints of a user's own jobs: schedules, models and optimizers that the project's launcher never has."""

from __future__ import annotations

import pytest

from tests.covering import in_turn

pytestmark = pytest.mark.distributed
MODULE = "tests.deepspeed.checkpoint_jobs"


SCHEDULES = [
    ("StepLR", "StepLR", "", []),
    ("WarmupLR", "WarmupLR", "", []),
    (
        "none",
        "none",
        "",
        ["without a schedule, learning rates are the checkpoint's: trunk 0.03 -> 0.01, norm "],
    ),
    (
        "StepLR",
        "WarmupLR",
        "the state of the learning-rate schedule StepLR",
        ["dropped of ", "the learning-rate schedule WarmupLR is not the checkpoint's: it stays where it is"],
    ),
    ("none", "StepLR", "", ["the learning-rate schedule StepLR is not the checkpoint's: it stays where it is"]),
    ("WarmupLR", "none", "the state of the learning-rate schedule WarmupLR", ["dropped of "]),
]


@pytest.mark.parametrize(("saved", "now", "dropped", "said", "stage"), in_turn(SCHEDULES, [0, 3]))
def test_schedules_go_on_or_begin_anew(ranks, tmp_path, saved, now, dropped, said, stage):
    for rank, found in enumerate(ranks(2).run(f"{MODULE}:other_schedule", stage, str(tmp_path), saved, now)):
        assert found["dropped"] == dropped
        assert found["same"]
        expected = said if rank == 0 else []
        assert len(found["said"]) == len(expected), found["said"]
        assert all(line.startswith(start) for line, start in zip(found["said"], expected, strict=True)), found["said"]
        rate, before, after = found["rates"]
        assert after == (rate if saved == now else before)
        assert found["goes_on"] == (saved == now)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_parameters_without_elements(ranks, tmp_path, stage):
    assert ranks(2).run(f"{MODULE}:empty_parameters", stage, str(tmp_path)) == [(2, 3)] * 2


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("spectrum", "spectrum (buffers) has dtype torch.complex64, which checkpoints cannot hold"),
        ("optimizer", "the engine's optimizer is AdamW, of which megalr's checkpoints know nothing"),
        ("inner", "another module than the engine's: 0.weight is layers.0.weight in the engine's model"),
    ],
)
def test_what_cannot_be_kept_is_refused_on_all_ranks(ranks, tmp_path, what, words):
    for message in ranks(2).run(f"{MODULE}:refused", 1, str(tmp_path), what):
        assert words in message
    assert list(tmp_path.iterdir()) == []


OTHER_LAYERS = [
    ("GaLoreAdamW", ["layers"], ["layers.0"]),
    ("GaLoreAdamW", ["layers.1"], ["layers"]),
    ("GaLoreAdamW", ["layers.0"], ["layers.1"]),
    ("BAdam", ["layers"], ["layers.0"]),  # one of the layers rests, and has no state
    ("BAdam", ["layers"], ["layers.1"]),
]


@pytest.mark.parametrize(("rule", "saved", "now", "stage"), in_turn(OTHER_LAYERS, [2, 3]))
def test_a_rule_for_other_layers_is_refused_on_all_ranks(ranks, tmp_path, rule, saved, now, stage):
    for message, unchanged in ranks(2).run(f"{MODULE}:other_targets", stage, str(tmp_path), saved, now, rule):
        assert "by another rule than the configuration has for them: resume with the target_modules" in message
        assert unchanged


@pytest.mark.parametrize("stage", [0, 3])
def test_what_one_rank_cannot_load_all_give_up(ranks, tmp_path, stage):
    layers = ["layers"]
    found = ranks(3).run(f"{MODULE}:other_targets", stage, str(tmp_path), layers, layers, "GaLoreAdamW", fails=1)
    others = "another process could not load: process 1: no such device. Nothing was loaded"
    assert found == [(others, True), ("no such device", True), (others, True)]


@pytest.mark.parametrize("stage", [2, pytest.param(0, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_compiled_and_plain_runs_go_on_from_each_other(ranks, tmp_path, stage):
    pairs = [("plain", "before"), ("before", "plain"), ("before", "engine"), ("plain", "engine"), ("engine", "plain")]
    if stage == 3:  # where DeepSpeed takes no model that is compiled before
        pairs = [pair for pair in pairs if "before" not in pair]
    assert ranks(2).run(f"{MODULE}:compiled", stage, str(tmp_path), pairs) == [[], []]


@pytest.mark.parametrize("stage", [0, 2])
def test_a_load_in_mid_update_is_refused(ranks, tmp_path, stage):
    for message in ranks(2).run(f"{MODULE}:begun", stage, str(tmp_path)):
        assert message.startswith("an update has begun: 2 of its 3 micro-batches are made")


@pytest.mark.parametrize("schedule", ["none", "StepLR", "WarmupLR"])
def test_another_rules_learning_rates_are_not_taken_over(ranks, tmp_path, schedule):
    for rates, expected, dropped in ranks(2).run(f"{MODULE}:other_groups", 1, str(tmp_path), schedule):
        assert rates == expected
        assert dropped.startswith("moments and states of rule galore")
        assert ("the state of the learning-rate schedule StepLR" in dropped) == (schedule == "StepLR")


@pytest.mark.parametrize("stage", [0, 3])
def test_buffers_are_the_first_processs(ranks, tmp_path, stage):
    assert ranks(3).run(f"{MODULE}:own_statistics", stage, str(tmp_path)) == [[1.0, 1.0, 1.0]] * 3


CONVERTED = [("low-rank",), ("projected",), ("SLTrain",), ("ReLoRA",), ("GaLore",), ("Muon",)]


@pytest.mark.parametrize(("method", "stage"), in_turn(CONVERTED, [1, 2, 3]))
def test_deepspeed_converts_its_own_checkpoints(ranks, tmp_path, method, stage):
    assert ranks(2).run(f"{MODULE}:converted_by_deepspeed", method, stage, str(tmp_path)) == [[], []]


def test_a_folder_a_checkpoint_of_it_and_latest(ranks, tmp_path):
    (updates, said), (_, others) = ranks(2).run(f"{MODULE}:ways_to_name", 2, str(tmp_path))
    assert updates == [2, 1, 2]
    assert said == ['`latest` names step1, which was written before step2: tag="step1" loads it']
    assert others == []


def test_a_load_waits_for_what_is_being_written(ranks, tmp_path):
    assert ranks(2).run(f"{MODULE}:load_at_once", 1, str(tmp_path)) == [1, 1]


def test_a_state_of_a_modules_own_is_not_kept_without_a_word(ranks, tmp_path):
    (said,) = ranks(1).run(f"{MODULE}:extra_state", 1, str(tmp_path))
    assert said == ["megalr's checkpoints do not hold what get_extra_state of layers.2 gives"]
