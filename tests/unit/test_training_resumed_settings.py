"""What of a JSON is said when a run is resumed with another."""

import pytest

from megalr.train.resumed_settings import EVALUATED, changed_settings, evaluated_before, further_settings

BEFORE = {
    "train_batch_size": 8,
    "bf16": {"enabled": False},
    "zero_optimization": {"stage": 2, "reduce_bucket_size": 500},
    "steps_per_print": 10,
}


def said(**changes):
    before, now = ({"steps": 3, "further": further_settings(each)} for each in (BEFORE, {**BEFORE, **changes}))
    return changed_settings(before, now)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, "torch_autocast: null -> {"),
        ({"communication_data_type": "bf16"}, 'communication_data_type: null -> "bf16"'),
        ({"prescale_gradients": True}, "prescale_gradients: null -> true"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "data_types: null -> {"),
        ({"zero_optimization": {"stage": 2, "zero_quantized_gradients": True}}, "zero_optimization: null -> {"),
        ({"a_key_of_a_later_version": 1}, "a_key_of_a_later_version: null -> 1"),
    ],
)
def test_every_key_that_may_change_numbers_is_said(changes, words):
    (line,) = said(**changes)
    assert line.startswith(words)


@pytest.mark.parametrize(
    "changes",
    [
        {"train_batch_size": 4},
        {"zero_optimization": {"stage": 3, "stage3_max_live_parameters": 7}},
        {"steps_per_print": 1, "wandb": {"enabled": True}},
        {"torch_autocast": {"enabled": False, "dtype": "bfloat16"}},
        {"fp16": {"enabled": False}, "communication_data_type": None, "prescale_gradients": False},
        {"service": {"api_key": "secret"}},
    ],
)
def test_layout_reports_and_what_is_switched_off_are_not(changes):
    assert said(**changes) == []


def test_a_checkpoint_of_before_these_were_noted():
    assert changed_settings({"steps": 3}, {"steps": 4, "further": {"prescale_gradients": True}}) == ["steps: 3 -> 4"]


def test_what_evaluations_read_is_noted_and_is_no_setting():
    assert changed_settings({"steps": 3, EVALUATED: 12}, {"steps": 3, "further": {}}) == []
    assert evaluated_before({EVALUATED: 12}) == 12
    assert [evaluated_before(each) for each in ({}, {EVALUATED: True}, {EVALUATED: "12"}, {EVALUATED: None})] == [
        None
    ] * 4
