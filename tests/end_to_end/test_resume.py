"""Stopping a run and going on: the same, bit for bit, as if it had not been stopped."""

import json
import re
import shlex
import signal

import psutil
import pytest

from tests.end_to_end.commands import (
    CONFIGS,
    PRETRAIN,
    assert_same_checkpoints,
    deepspeed,
    metrics,
    plain,
    run,
    small_run,
    started,
    timeless,
    torchrun,
)

STEPS = 40
LAUNCHERS = {
    "plain": plain,
    "deepspeed": lambda: deepspeed(2),
    # Itself it ignores SIGUSR1; its ranks take it as a request all the same.
    "deaf": lambda: ["bash", "-c", "trap '' USR1; exec \"$@\"", "bash", *deepspeed(2)],
    "torchrun": lambda: torchrun(2),
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """By the processes that train: flags of a run, and the folder of one that nobody has stopped."""
    folder = tmp_path_factory.mktemp("undisturbed")
    flags = ["--deepspeed", CONFIGS / "zero2_lowrank.json", *small_run(folder), "--steps", str(STEPS)]
    flags += ["--eval-every", str(STEPS)]
    starts = {"plain": plain, "two processes": lambda: deepspeed(2)}

    def of(processes):
        if not (folder / processes).exists():
            whole = run([*starts[processes](), PRETRAIN, *flags, "--output", processes], folder)
            assert whole.code == 0, whole.output
        return flags, folder / processes

    return of


def stop_launcher(process):
    process.send_signal(signal.SIGTERM)


def stop_one_rank(process):
    ranks_of(process)[-1].terminate()


def warn_ranks(process):
    """As a queue does before the time is up."""
    for rank in ranks_of(process):
        rank.send_signal(signal.SIGUSR1)


def warn_everybody(process):
    """The launcher, too."""
    process.signal_group(signal.SIGUSR1)


def ranks_of(process):
    children = psutil.Process(process.pid).children(recursive=True)
    ranks = [child for child in children if not child.children() and str(PRETRAIN) in child.cmdline()]
    return ranks or [psutil.Process(process.pid)]


def press_ctrl_c(process):
    process.signal_group(signal.SIGINT)


@pytest.mark.parametrize(
    ("launcher", "stop", "code"),
    [
        ("plain", press_ctrl_c, 0),
        ("plain", warn_ranks, 75),
        pytest.param("plain", stop_launcher, 75, marks=pytest.mark.slow),
        pytest.param("deepspeed", warn_ranks, 75, marks=pytest.mark.slow),
        pytest.param("deepspeed", stop_one_rank, 75, marks=pytest.mark.slow),
        pytest.param("deaf", warn_everybody, 75, marks=pytest.mark.slow),
        # The command itself ends by the signal, at once.
        pytest.param("deepspeed", stop_launcher, -signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param("deepspeed", press_ctrl_c, -signal.SIGINT, marks=pytest.mark.slow),
        # It makes 1 of whatever its ranks end with.
        pytest.param("torchrun", warn_ranks, 1, marks=pytest.mark.slow),
        pytest.param("torchrun", stop_one_rank, 1, marks=pytest.mark.slow),
        pytest.param("torchrun", stop_launcher, 1, marks=pytest.mark.slow),
        pytest.param("torchrun", press_ctrl_c, 1, marks=pytest.mark.slow),
    ],
)
def test_a_stopped_run_goes_on_as_if_it_had_not_been(tmp_path, undisturbed, launcher, stop, code):
    flags, whole = undisturbed("plain" if launcher == "plain" else "two processes")
    with started([*LAUNCHERS[launcher](), PRETRAIN, *flags, "--output", "stopped"], tmp_path) as process:
        process.read_until("| 0/40")  # the bar: from here on a signal is a request
        stop(process)
        stopped = process.wait()  # for the last rank, which may outlive its launcher
        assert stopped.code == code, stopped.output

    assert not (tmp_path / "stopped/summary.json").exists()
    words = re.search(r"to go on, start \d process(?:es)? of: (.*)", stopped.output)
    assert words, stopped.output
    stopped_at = metrics(tmp_path / "stopped")[-1]["step"]
    assert stopped.output.count("stopping after this update, and saving") == 1
    assert stopped.output.count("scoring the untrained model on ") == 1
    assert f") after update {stopped_at}; the checkpoint is in " in stopped.output
    assert 0 < stopped_at < STEPS
    assert (tmp_path / "stopped/checkpoints/latest").read_text() == f"step{stopped_at}"

    rest_of_it = run([*LAUNCHERS[launcher](), *shlex.split(words.group(1))], tmp_path)
    assert rest_of_it.code == 0, rest_of_it.output
    assert f"tokens per second after update {stopped_at} " in rest_of_it.output
    settings = json.loads((tmp_path / "stopped/run.json").read_text())
    first, second = settings["lives"]
    assert (first["from_update"], first["to_update"], second["from_update"]) == (0, stopped_at, stopped_at)
    assert f"({first['ended']}) after update" in stopped.output
    assert (second["to_update"], second["ended"]) == (STEPS, "finished")
    assert settings["started"] == first["started"] <= second["started"]
    assert first["processes"] == second["processes"] == (1 if launcher == "plain" else 2)
    assert "--local_rank" not in settings["command"]
    assert timeless(metrics(tmp_path / "stopped")) == timeless(metrics(whole))
    last = f"checkpoints/step{STEPS}"
    assert_same_checkpoints(tmp_path / "stopped" / last, whole / last)


def test_a_run_that_was_stopped_before_its_first_update_begins_anew(tmp_path):
    flags = ["--deepspeed", CONFIGS / "zero2_lowrank.json", *small_run(tmp_path), "--steps", "3", "--eval-every", "3"]
    flags += ["--max-eval-tokens", "100000", "--output", "a run"]  # enough to be interrupted in the first evaluation
    with started([*plain(), PRETRAIN, *flags], tmp_path) as process:
        process.read_until("writing to")
        warn_ranks(process)
        stopped = process.wait()
        assert stopped.code == 75, stopped.output
    assert (tmp_path / "a run/run.json").exists()
    assert not (tmp_path / "a run/checkpoints").exists()

    again = run([*plain(), PRETRAIN, *flags, "--resume"], tmp_path)
    assert again.code == 0, again.output
    assert "has no checkpoint yet: it begins anew" in again.output
    assert [row["step"] for row in metrics(tmp_path / "a run")][-1] == 3

    elsewhere = run([*plain(), PRETRAIN, *flags, "--resume", "--output", "nowhere"], tmp_path)
    assert elsewhere.code == 2
    assert "so there is nothing to resume" in elsewhere.output


def test_a_checkpoint_that_could_not_be_written_ends_no_run(tmp_path):
    flags = [
        "--deepspeed",
        CONFIGS / "zero2_lowrank.json",
        *small_run(tmp_path),
        "--save-every",
        "2",
        "--output",
        "run",
    ]
    assert run([*plain(), PRETRAIN, *flags, "--output", "run", "--steps", "2"], tmp_path).code == 0
    blocked = tmp_path / "run/checkpoints/step4"
    blocked.mkdir()
    (blocked / "somebody else's").write_text("")

    rest = run([*plain(), PRETRAIN, *flags, "--output", "run", "--steps", "6", "--resume"], tmp_path)
    assert rest.code == 0, rest.output
    assert "step4 could not be written: process 0: it is there already and no megalr checkpoint" in rest.output
    assert "The training goes on, and tries again with step 6" in rest.output
    assert (tmp_path / "run/checkpoints/latest").read_text() == "step6"

    last = run([*plain(), PRETRAIN, *flags, "--steps", "4", "--output", "other"], tmp_path)
    assert last.code == 0, last.output
    other = tmp_path / "other/checkpoints/step6"
    other.mkdir()
    (other / "somebody else's").write_text("")
    last = run([*plain(), PRETRAIN, *flags, "--steps", "6", "--output", "other", "--resume"], tmp_path)
    assert last.code == 2, last.output  # nothing to go on from, and nobody who would try again
    assert "step6 could not be written" in last.output


def test_a_killed_launcher_leaves_a_checkpoint(tmp_path):
    """`kill` of the `deepspeed` command reaches no rank; they notice."""
    flags = ["--deepspeed", CONFIGS / "zero2_lowrank.json", *small_run(tmp_path), "--output", "stopped"]
    flags += ["--steps", "5000", "--eval-every", "5000"]
    with started([*deepspeed(2), PRETRAIN, *flags], tmp_path) as process:
        process.read_until("| 0/5000")
        stop_launcher(process)
        stopped = process.wait()

    assert "stopped on request (the launcher is gone)" in stopped.output
    tag = (tmp_path / "stopped/checkpoints/latest").read_text()
    assert tag == f"step{metrics(tmp_path / 'stopped')[-1]['step']}"
    shards = [file.name for file in (tmp_path / "stopped/checkpoints" / tag).glob("*.safetensors")]
    assert len(shards) == 2


@pytest.mark.slow
def test_a_launcher_that_is_killed_while_ranks_start_leaves_none(tmp_path):
    """They end with the code of a run that was stopped, and the other process of the launcher with them."""
    flags = ["--deepspeed", CONFIGS / "zero2_lowrank.json", *small_run(tmp_path), "--steps", "200", "--output", "none"]
    with started([*deepspeed(2), PRETRAIN, *flags], tmp_path) as process:
        process.read_until("spawned with command")
        stop_launcher(process)
        stopped = process.wait()

    assert "exits with return code = 75" in stopped.output
    assert not (tmp_path / "none/checkpoints").exists()
