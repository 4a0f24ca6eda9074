"""Killed again and again under a loop that starts it again: the weights at the end are those of a run in peace."""

import random
import signal
from contextlib import suppress

import psutil
import pytest

from tests.end_to_end.commands import (
    CONFIGS,
    PRETRAIN,
    assert_same_checkpoints,
    metrics,
    plain,
    run,
    small_run,
    started,
    timeless,
    torchrun,
)

LONGEST = 2.0  # seconds of training before a kill


def kill(process, random_numbers):
    """Kill -9: one of the processes that train, or all there are."""
    everyone = psutil.Process(process.pid).children(recursive=True)
    ranks = [each for each in everyone if not each.children()] or [psutil.Process(process.pid)]
    chosen = [random_numbers.choice(ranks)] if random_numbers.random() < 0.5 else [*everyone, process]
    for each in chosen:
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            each.send_signal(signal.SIGKILL)
    if len(chosen) == 1:
        process.wait()  # the launcher notices, and ends the others


@pytest.mark.parametrize(
    ("launcher", "processes", "kills", "steps"),
    [("plain", 1, 2, 60), pytest.param("torchrun", 2, 20, 400, marks=pytest.mark.slow)],
)
def test_the_same_weights_as_undisturbed(tmp_path, launcher, processes, kills, steps):
    def command(*more):
        start = plain() if launcher == "plain" else torchrun(processes)
        flags = ["--deepspeed", CONFIGS / "zero2_lowrank.json", *small_run(tmp_path), "--steps", str(steps)]
        return [
            *start,
            PRETRAIN,
            *flags,
            "--eval-every",
            str(steps),
            "--save-every",
            "3",
            "--keep-checkpoints",
            "3",
            *more,
        ]

    random_numbers = random.Random(0)
    whole = run(command("--output", "whole"), tmp_path)
    assert whole.code == 0, whole.output

    killed, checkpoints = 0, tmp_path / "killed" / "checkpoints"
    while not (tmp_path / "killed" / "summary.json").exists():
        how = "--resume" if (checkpoints / "latest").exists() else "--overwrite"
        with started(command("--output", "killed", how), tmp_path) as process:
            if killed == kills:
                rest = process.wait()
                assert rest.code == 0, rest.output
                break
            process.read_until(f"/{steps}")  # the bar: training begins
            if not process.watch(random_numbers.uniform(0.0, LONGEST)):
                kill(process, random_numbers)
                killed += 1
    assert killed == kills, "the run was over before it had been killed often enough"
    assert_same_checkpoints(checkpoints / f"step{steps}", tmp_path / "whole" / "checkpoints" / f"step{steps}")
    assert timeless(metrics(tmp_path / "killed")) == timeless(metrics(tmp_path / "whole"))
