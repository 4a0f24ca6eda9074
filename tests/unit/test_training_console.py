"""What a run says on the way: at a request to stop, when it goes on, while it waits."""

import logging
import shlex

import pytest

from megalr.train import console, quiet
from megalr.train.console import Screen
from megalr.train.pretrain import how_to_resume
from tests.processes import python, run


@pytest.mark.parametrize(
    ("argv", "processes", "on_one_node", "line"),
    [
        ("megalr pretrain --deepspeed a.json --output r", 1, True,
         "to go on: megalr pretrain --processes 1 --deepspeed a.json --output r --resume"),
        ("megalr pretrain --local_rank=0 --deepspeed a.json --overwrite", 4, True,
         "to go on: megalr pretrain --processes 4 --deepspeed a.json --output 'the run' --resume"),
        ("megalr pretrain --deepspeed a.json --output=r --resume", 8, False,
         "to go on, start 8 processes of: megalr pretrain --deepspeed a.json --output=r --resume"),
        ("launchers/pretrain.py --local_rank=0 --deepspeed a.json --output r", 1, True,
         "to go on, start 1 process of: launchers/pretrain.py --deepspeed a.json --output r --resume"),
    ],
)  # fmt: skip
def test_the_command_that_goes_on_starts_as_many_processes(tmp_path, argv, processes, on_one_node, line):
    folder = tmp_path / "the run"
    found = how_to_resume(shlex.split(argv), folder, processes, on_one_node=on_one_node)
    assert found.replace(str(folder), "the run") == line


def test_a_line_may_be_printed_while_another_one_is():
    """As a handler of a signal does, which is called in the midst of a write to the same stream."""
    script = """
import signal, sys, threading, time
from megalr.train.console import Screen
screen = Screen(enabled=True)
signal.signal(signal.SIGALRM, lambda number, frame: screen.say_at_once("stopping"))
signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
end = time.monotonic() + 1
while time.monotonic() < end:
    screen.say("a line of the run, again and again")
signal.setitimer(signal.ITIMER_REAL, 0)
"""
    lines = set(run(python(script)).stdout.splitlines())
    assert lines == {"a line of the run, again and again", "stopping"}


def test_other_ranks_say_nothing_at_once(monkeypatch):
    monkeypatch.setattr(console.os, "write", lambda *words: pytest.fail(str(words)))
    Screen(enabled=False).say_at_once("stopping")


@pytest.mark.parametrize("rank", ["0", "1"])
def test_the_first_rank_says_that_ops_are_compiled(tmp_path, rank):
    script = """
import os, sys
from pathlib import Path
from megalr.ops import build
from megalr.train.quiet import show_builds
if os.environ["RANK"] == "0":
    show_builds()
    show_builds()
build._missing = lambda kind: None
build.compile_library = lambda kind, folder: Path(sys.argv[1])
build.build("cpu")
"""
    variables = {"MEGALR_OPS_CACHE": str(tmp_path / "ops"), "RANK": rank}
    said = run(python(script, tmp_path / "x.so"), env=variables).stderr
    line = f"compiling the ops for cpu tensors, once, into {tmp_path / 'ops'} (a minute)\n"
    assert said == (line if rank == "0" else "")


def test_who_has_set_up_logging_sees_builds_there_alone(monkeypatch):
    builds = logging.getLogger("megalr.ops.build")
    before = list(builds.handlers)
    monkeypatch.setattr(logging.getLogger(), "handlers", [logging.NullHandler()])
    quiet.show_builds()
    assert builds.handlers == before
