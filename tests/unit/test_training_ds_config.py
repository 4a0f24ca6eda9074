"""Resolving "auto" in the DeepSpeed JSON."""

import copy

import pytest

from megalr.errors import UserError
from megalr.train.ds_config import Batch, Request, resolve


def request(world_size=1, **changes):
    values = {
        "world_size": world_size,
        "bf16_is_fast": False,
        "default_batch_size": 12,
        "default_steps": 450,
        "largest_micro_batch": 16,
        "default_rank": 32,
        "output": "runs/x",
    }
    return Request(**{**values, **changes})


@pytest.mark.parametrize(
    ("config", "world_size", "expected"),
    [
        ({}, 1, Batch(total=12, micro=12, accumulation=1)),
        ({}, 2, Batch(total=12, micro=6, accumulation=1)),
        ({}, 3, Batch(total=12, micro=4, accumulation=1)),
        ({}, 5, Batch(total=15, micro=3, accumulation=1)),  # the default is rounded up
        ({}, 16, Batch(total=16, micro=1, accumulation=1)),
        ({"train_batch_size": 512}, 4, Batch(total=512, micro=16, accumulation=8)),
        ({"train_batch_size": 34}, 1, Batch(total=34, micro=2, accumulation=17)),
        ({"gradient_accumulation_steps": 4}, 3, Batch(total=12, micro=1, accumulation=4)),
        ({"gradient_accumulation_steps": 4}, 2, Batch(total=16, micro=2, accumulation=4)),
        ({"train_micro_batch_size_per_gpu": 2}, 3, Batch(total=12, micro=2, accumulation=2)),
        (
            {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 5},
            3,
            Batch(total=60, micro=4, accumulation=5),
        ),
    ],
)
def test_the_three_batch_sizes_always_multiply(config, world_size, expected):
    resolved = resolve(config, request(world_size))

    assert resolved.batch == expected
    assert resolved.config["train_batch_size"] == expected.total
    assert resolved.config["train_micro_batch_size_per_gpu"] == expected.micro
    assert resolved.config["gradient_accumulation_steps"] == expected.accumulation
    assert expected.micro * expected.accumulation * world_size == expected.total


@pytest.mark.parametrize("total", range(1, 40))
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_batch_is_split_or_refused_with_the_nearest_sizes(total, world_size):
    if total % world_size == 0:
        batch = resolve({"train_batch_size": total}, request(world_size)).batch
        assert batch.micro * batch.accumulation * world_size == batch.total == total
        return
    with pytest.raises(UserError) as error:
        resolve({"train_batch_size": total}, request(world_size))
    above = (total // world_size + 1) * world_size
    assert f"{above} (train_batch_size" in str(error.value)
    if total > world_size:
        assert f"write {above - world_size} or {above}" in str(error.value)


def test_flags_fill_what_the_json_leaves_open():
    config = {"train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto"}

    resolved = resolve(config, request(2, batch_size=24, micro_batch_size=3, steps=7, seed=5))

    assert resolved.batch == Batch(total=24, micro=3, accumulation=4)
    assert (resolved.steps, resolved.seed, resolved.config["megalr"]["seed"]) == (7, 5, 5)


@pytest.mark.parametrize(
    ("config", "flags", "words"),
    [
        ({"train_batch_size": 8}, {"batch_size": 12}, ["--batch-size is 12", "train_batch_size = 8"]),
        (
            {"train_micro_batch_size_per_gpu": 2},
            {"micro_batch_size": 4},
            ["--micro-batch-size is 4", "train_micro_batch_size_per_gpu = 2"],
        ),
        (
            {"scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": 100}}},
            {"steps": 50},
            ["--steps is 50", "total_num_steps = 100"],
        ),
        ({"megalr": {"seed": 1}}, {"seed": 2}, ["--seed is 2", "megalr.seed = 1"]),
        ({"train_batch_size": "twelve"}, {}, ["train_batch_size is 'twelve'", "whole number"]),
        ({"train_batch_size": 0}, {}, ["train_batch_size is 0"]),
        ({"zero_optimization": {"reduce_bucket_size": "auto"}}, {}, ["zero_optimization.reduce_bucket_size"]),
        ({"zero_optimization": 2}, {"world_size": 1}, []),
        (
            {
                "train_batch_size": 24,
                "train_micro_batch_size_per_gpu": 4,
                "gradient_accumulation_steps": 2,
            },
            {},
            ["4 sequences at a time x 2 accumulation steps", '"train_batch_size": 8'],
        ),
    ],
)
def test_contradictions_are_refused(config, flags, words):
    if not words:
        assert resolve(config, request(**flags)).steps == 450  # what DeepSpeed is to check is left to it
        return
    with pytest.raises(UserError) as error:
        resolve(config, request(**flags))
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("config", "fast", "bf16"),
    [
        ({"bf16": {"enabled": "auto"}}, True, True),
        ({"bf16": {"enabled": "auto"}}, False, False),
        ({"bf16": {"enabled": True}}, False, True),
        ({"bf16": {"enabled": False}}, True, False),
        ({"bf16": {"enabled": "auto"}, "fp16": {"enabled": True}}, True, False),
        ({}, True, False),
    ],
)
def test_bf16_is_on_where_it_is_fast(config, fast, bf16):
    resolved = resolve(config, request(bf16_is_fast=fast))

    assert resolved.bf16 is bf16
    assert resolved.config.get("bf16", {"enabled": False})["enabled"] is bf16


def test_the_choice_of_precision_is_reported():
    notes = resolve({"bf16": {"enabled": "auto"}}, request()).notes

    assert [note for note in notes if note.startswith("precision: fp32")]
    notes = resolve({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, request()).notes
    assert "torch_autocast: matrices are multiplied in bfloat16" in notes


def test_schedule_follows_the_steps():
    params = {"total_num_steps": "auto", "warmup_num_steps": "auto", "warmup_type": "linear"}
    config = {"scheduler": {"type": "WarmupCosineLR", "params": params}}

    resolved = resolve(config, request(steps=1234))

    assert resolved.config["scheduler"]["params"] == {
        "total_num_steps": 1234,
        "warmup_num_steps": 123,
        "warmup_type": "linear",
    }


def test_a_written_schedule_decides_the_steps():
    config = {"scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": 80, "warmup_num_steps": 3}}}

    resolved = resolve(config, request())

    assert resolved.steps == 80
    assert resolved.config["scheduler"]["params"]["warmup_num_steps"] == 3


def test_monitors_write_into_the_run_folder():
    config = {"tensorboard": {"enabled": True, "output_path": "auto", "job_name": "auto"}}

    assert resolve(config, request()).config["tensorboard"] == {
        "enabled": True,
        "output_path": "runs/x",
        "job_name": "tensorboard",
    }


def test_rank_follows_the_model():
    config = {"megalr": {"parametrization": {"type": "low_rank", "rank": "auto"}}}

    resolved = resolve(config, request(default_rank=128))

    assert resolved.config["megalr"]["parametrization"] == {"type": "low_rank", "rank": 128}


def test_the_users_json_is_left_alone():
    config = {
        "bf16": {"enabled": "auto"},
        "scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": "auto"}},
        "megalr": {"parametrization": {"rank": "auto"}},
        "tensorboard": {"output_path": "auto"},
    }
    before = copy.deepcopy(config)

    resolve(config, request())

    assert config == before
