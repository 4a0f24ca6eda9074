"""Python programs side by side, none of which outlives this one."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megalr.benchmarks.traffic import import_path

POLL_SECONDS = 0.1
PR_SET_PDEATHSIG = 1  # of Linux' prctl
# Of a launcher that this program may itself run under; each child is a group of one.
NOT_INHERITED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Ended:
    """A program that has ended.

    Attributes:
        name: its name.
        code: its exit code.
        seconds: how long it took.
        log: what it printed.
    """

    name: str
    code: int
    seconds: float
    log: Path


@dataclass(frozen=True)
class _Started:
    name: str
    process: subprocess.Popen[bytes]
    log: Path
    since: float


def run_processes(commands: Mapping[str, Sequence[str]], folder: Path, jobs: int) -> Iterator[Ended]:
    """Run Python programs in turn, ``jobs`` at a time, each with one thread, and yield each when it has ended.

    Whoever stops listening, or fails, ends those that still run; so does the death of this process.

    Args:
        commands: the programs' paths and arguments, by name.
        folder: gets a file for what each prints.
        jobs: how many at a time.
    """
    waiting, running = list(commands.items()), list[_Started]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(_start(*waiting.pop(0), folder))
            ended = [one for one in running if one.process.poll() is not None]
            for one in ended:
                running.remove(one)
                yield Ended(one.name, one.process.returncode, time.monotonic() - one.since, one.log)
            if not ended:
                time.sleep(POLL_SECONDS)
    finally:
        for one in running:
            with suppress(ProcessLookupError):
                os.killpg(one.process.pid, signal.SIGKILL)
            one.process.wait()


def _start(name: str, command: Sequence[str], folder: Path) -> _Started:
    environment = {key: value for key, value in os.environ.items() if key not in NOT_INHERITED}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": import_path()}
    log = folder / f"{name}.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C is for this program, which then ends them
            preexec_fn=die_with_parent(),  # noqa: PLW1509  (one system call, which takes no lock)
        )
    return _Started(name, process, log, time.monotonic())


def die_with_parent() -> Callable[[], object] | None:
    """Has the kernel kill a child when this process is gone, even by SIGKILL, which nobody can catch."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
