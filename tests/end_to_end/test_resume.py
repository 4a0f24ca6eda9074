"""Stopping a run and going on: the same, bit for bit, as if it had not been stopped."""

import os
import re
import shlex
import signal
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from tests.end_to_end.commands import (
    CONFIGS,
    PRETRAIN,
    deepspeed,
    metrics,
    plain,
    read_until,
    run,
    small_run,
    started,
    torchrun,
)

STEPS = 40
LAUNCHERS = {"deepspeed": lambda: deepspeed(2), "torchrun": lambda: torchrun(2), "plain": plain}


def stop_launcher(process):
    process.send_signal(signal.SIGTERM)


def stop_one_rank(process):
    children = psutil.Process(process.pid).children(recursive=True)
    ranks = [child for child in children if not child.children() and str(PRETRAIN) in child.cmdline()]
    ranks[-1].terminate()


def press_ctrl_c(process):
    os.killpg(process.pid, signal.SIGINT)


@pytest.mark.parametrize(
    ("launcher", "stop"),
    [
        ("plain", press_ctrl_c),
        ("deepspeed", stop_launcher),
        pytest.param("deepspeed", stop_one_rank, marks=pytest.mark.slow),
        pytest.param("deepspeed", press_ctrl_c, marks=pytest.mark.slow),
        pytest.param("torchrun", stop_launcher, marks=pytest.mark.slow),
        pytest.param("torchrun", stop_one_rank, marks=pytest.mark.slow),
        pytest.param("torchrun", press_ctrl_c, marks=pytest.mark.slow),
    ],
)
def test_a_stopped_run_goes_on_as_if_it_had_not_been(tmp_path, launcher, stop):
    flags = ["--deepspeed", CONFIGS / "zero2_lowrank.json", *small_run(tmp_path), "--steps", str(STEPS)]
    flags += ["--eval-every", str(STEPS)]
    whole = run([*LAUNCHERS[launcher](), PRETRAIN, *flags, "--output", "whole"], tmp_path)
    assert whole.code == 0, whole.output

    with started([*LAUNCHERS[launcher](), PRETRAIN, *flags, "--output", "stopped"], tmp_path) as process:
        read_until(process, b"| 0/40")  # the bar: from here on a signal is a request
        stop(process)
        rest, _ = process.communicate(timeout=120)  # ends when the last rank has closed the pipe

    assert not (tmp_path / "stopped/summary.json").exists()
    words = re.search(r"to go on, start \d process(?:es)? of: (.*)", rest.decode())
    assert words, rest.decode()
    stopped_at = metrics(tmp_path / "stopped")[-1]["step"]
    assert 0 < stopped_at < STEPS
    assert (tmp_path / "stopped/checkpoints/latest").read_text() == f"step{stopped_at}"

    rest_of_it = run([*LAUNCHERS[launcher](), *shlex.split(words.group(1))], tmp_path)
    assert rest_of_it.code == 0, rest_of_it.output
    assert without_time(metrics(tmp_path / "stopped")) == without_time(metrics(tmp_path / "whole"))
    assert_same_checkpoints(tmp_path / "stopped", tmp_path / "whole")


def test_another_number_of_processes_is_refused(tmp_path):
    flags = ["--deepspeed", CONFIGS / "zero1_lowrank.json", *small_run(tmp_path), "--steps", "2", "--output", "x"]
    assert run([*plain(), PRETRAIN, *flags], tmp_path).code == 0

    result = run([*deepspeed(2), PRETRAIN, *flags, "--resume"], tmp_path)

    assert result.code == 2, result.output
    assert "processes: 1 -> 2" in result.output


def without_time(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "tokens_per_second"} for row in rows]


def assert_same_checkpoints(one: Path, other: Path) -> None:
    files = sorted(file.name for file in (other / f"checkpoints/step{STEPS}").glob("*.pt"))
    assert files
    for name in files:
        first, second = (
            torch.load(run_folder / f"checkpoints/step{STEPS}" / name, weights_only=False)
            for run_folder in (one, other)
        )
        for content in (first, second):
            content.pop("ds_config")  # it names the folder
        assert_same(first, second, name)


def assert_same(one: Any, other: Any, where: str) -> None:
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, np.ndarray):
        assert np.array_equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key, value in one.items():
            assert_same(value, other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for index, value in enumerate(one):
            assert_same(value, other[index], f"{where}[{index}]")
    elif isinstance(one, str | int | float | bool | type(None)):
        assert one == other, where
