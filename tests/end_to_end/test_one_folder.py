"""A folder has one run at a time, and keeps the one that it has until another has come of the next."""

import contextlib
import re
import shutil
import signal
import socket

import pytest

from tests.end_to_end.commands import CONFIGS, PRETRAIN, metrics, plain, run, small_run, started, write_config

WAYS = {"new": [], "overwrite": ["--overwrite"], "resume": ["--resume"]}
LONG = ["--steps", "5000", "--eval-every", "5000", "--max-eval-tokens", "200"]


def command(folder, *more):
    return [*plain(), PRETRAIN, "--deepspeed", CONFIGS / "zero2_lowrank.json", *small_run(folder), *LONG, *more]


def stop(process):
    """As a queue does: the checkpoint is written, and the run may go on."""
    process.send_signal(signal.SIGUSR1)
    ended = process.wait()
    assert ended.code == 75, ended.output
    return ended.output


def test_of_two_runs_in_one_folder_the_first_trains_and_the_second_names_it(tmp_path):
    """All nine pairs. The first that begins anew needs an empty folder, the others go on from it, or replace it."""
    step = 0
    for first in ("new", "resume", "overwrite"):
        with contextlib.ExitStack() as all_of_them:
            holder = all_of_them.enter_context(started(command(tmp_path, "--output", "one", *WAYS[first]), tmp_path))
            holder.read_until("| ")  # the bar: it trains
            words = [command(tmp_path, "--output", "one", *way) for way in WAYS.values()]
            seconds = [all_of_them.enter_context(started(each, tmp_path)) for each in words]
            for way, second in zip(WAYS, seconds, strict=True):
                ended = second.wait()
                assert ended.code == 2, (first, way, ended.output)
                named = re.findall(
                    r"error: process (\d+) on (\S+), started (\d{4}-\d\d-\d\d \d\d:\d\d:\d\d), writes into one: (.*)",
                    ended.output,
                )
                assert [each[:2] for each in named] == [(str(holder.pid), socket.gethostname())], (first, way)
                assert "--output" in named[0][3]
            stop(holder)
        rows = [row["step"] for row in metrics(tmp_path / "one") if "loss" in row]
        assert rows == list(range(1, len(rows) + 1)), first
        assert (tmp_path / "one/checkpoints/latest").read_text() == f"step{len(rows)}"
        assert (len(rows) > step) or first == "overwrite"
        step = len(rows)
        assert not (tmp_path / "one/.writer.json").exists()


def test_two_runs_that_start_together_have_a_folder_each(tmp_path):
    with started(command(tmp_path), tmp_path) as one, started(command(tmp_path), tmp_path) as other:
        printed = [each.read_until("| ") for each in (one, other)]
        for each in (one, other):
            stop(each)
    assert sorted(re.search("writing to (.*)", text).group(1) for text in printed) == [
        "runs/zero2_lowrank",
        "runs/zero2_lowrank-2",
    ]
    for name in ("zero2_lowrank", "zero2_lowrank-2"):
        rows = [row["step"] for row in metrics(tmp_path / "runs" / name) if "loss" in row]
        assert rows == list(range(1, len(rows) + 1))


def everything(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


KEY = "a key of comet's"


def with_key(folder, key):
    return write_config(folder / "with a key.json", comet={"enabled": False, "api_key": key}, log_level="info")


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    """A finished run in a folder, whose JSON had a key in it; and what it printed, with all that DeepSpeed says."""
    folder = tmp_path_factory.mktemp("old")
    flags = ["--deepspeed", with_key(folder, KEY), *small_run(folder), "--steps", "2", "--output", "old", "--verbose"]
    ended = run([*plain(), PRETRAIN, *flags], folder)
    assert ended.code == 0, ended.output
    return folder, ended.output


def test_a_key_is_in_no_file_and_no_log(old, tmp_path):
    folder, printed = old
    assert "api_key" in printed and KEY not in printed
    assert not [path for path, content in everything(folder / "old").items() if KEY.encode() in content]
    shutil.copytree(folder / "old", tmp_path / "old")
    flags = ["--deepspeed", with_key(tmp_path, "rotated"), *small_run(tmp_path), "--steps", "3", "--output", "old"]
    resumed = run([*plain(), PRETRAIN, *flags, "--resume"], tmp_path)
    assert resumed.code == 0, resumed.output
    assert "steps: 2 -> 3" in resumed.output and "comet" not in resumed.output and "rotated" not in resumed.output


SCHEDULER = {"type": "WarmupDecayLR", "params": {"total_num_steps": 2, "warmup_max_lr": 1e-3, "warmup_num_steps": 0}}
MISTAKES = {
    "warmup": {"scheduler": SCHEDULER},
    "seed": {"megalr": {"seed": 2**70}},
    "clipping": {"gradient_clipping": "1.0"},
    "late": {
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": [1e-3] * 99}}
    },  # not before the engine is made
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_leaves_the_run_that_was_to_be_replaced(old, tmp_path, mistake):
    folder, _ = old
    before = everything(folder / "old")
    config = write_config(tmp_path / "mine.json", **MISTAKES[mistake])
    flags = ["--deepspeed", config, *small_run(tmp_path), "--steps", "2", "--output", "old", "--overwrite"]
    ended = run([*plain(), PRETRAIN, *flags], folder)
    assert ended.code == 2, ended.output
    assert "Traceback" not in ended.output and "error: " in ended.output
    assert everything(folder / "old") == before
