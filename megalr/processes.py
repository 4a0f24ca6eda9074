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

from benchmarks.traffic import import_path
from megalr.train.ranks import free_port

POLL_SECONDS = 0.1
PR_SET_PDEATHSIG = 1  # of Linux' prctl
# Of a launcher that this program may itself run under; each child is a group of one.
NOT_INHERITED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")

# glibc returns large blocks that are freed to the kernel, which hands them out again page by page, zeroed: a seventh of
# the time of a run of the tiny model, whose logits are tens of megabytes.
KEEP_FREED_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}


@dataclass(frozen=True)
class Ended:
    """A program that has ended.

    Attributes:
        name: its name.
        code: its exit code; of several processes the first that failed.
        seconds: how long it took.
        log: what it printed.
    """

    name: str
    code: int
    seconds: float
    log: Path


@dataclass
class _Started:
    name: str
    processes: list[subprocess.Popen[bytes]]
    log: Path
    since: float
    slot: int
    code: int = 0

    def ended(self) -> bool:
        """Whether all processes are gone; where one has failed, the others are made to go."""
        codes = [process.poll() for process in self.processes]
        self.code = self.code or next((code for code in codes if code), 0)
        if self.code and None in codes:
            self.kill()
            return True
        return None not in codes

    def kill(self) -> None:
        """End what still runs."""
        for process in self.processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def run_processes(
    commands: Mapping[str, Sequence[str]], folder: Path, jobs: int, *, ranks: int = 1, gpus: Sequence[str] = ()
) -> Iterator[Ended]:
    """Run Python programs in turn, ``jobs`` at a time, each with one thread, and yield each when it has ended.

    Whoever stops listening, or fails, ends those that still run; so does the death of this process.

    Args:
        commands: the programs' paths and arguments, by name.
        folder: gets a file for what each prints.
        jobs: how many at a time.
        ranks: processes of each, which find each other by the variables that ``torchrun`` sets.
        gpus: what CUDA_VISIBLE_DEVICES calls the GPUs to use, ``jobs * ranks`` of them; empty leaves the choice to
            the programs.
    """
    waiting, running = list(commands.items()), list[_Started]()
    slots = list(range(jobs))
    try:
        while waiting or running:
            while waiting and slots:
                slot = slots.pop(0)
                running.append(_start(*waiting.pop(0), folder, slot, ranks, gpus[slot * ranks : (slot + 1) * ranks]))
            ended = [one for one in running if one.ended()]
            for one in ended:
                running.remove(one)
                slots.append(one.slot)
                yield Ended(one.name, one.code, time.monotonic() - one.since, one.log)
            if not ended:
                time.sleep(POLL_SECONDS)
    finally:
        for one in running:
            one.kill()


def _start(name: str, command: Sequence[str], folder: Path, slot: int, ranks: int, gpus: Sequence[str]) -> _Started:
    environment = KEEP_FREED_MEMORY | {key: value for key, value in os.environ.items() if key not in NOT_INHERITED}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": import_path()}
    if gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    if ranks > 1:
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        environment |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks)}
    log = folder / f"{name}.log"
    started = _Started(name, [], log, time.monotonic(), slot)
    with log.open("wb") as file:
        for rank in range(ranks):
            if ranks > 1:
                environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = subprocess.Popen(
                [sys.executable, *command],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C is for this program, which then ends them
                preexec_fn=die_with_parent(),  # noqa: PLW1509  (one system call, which takes no lock)
            )
            started.processes.append(process)
    return started


def die_with_parent() -> Callable[[], object] | None:
    """Has the kernel kill a child when this process is gone, even by SIGKILL, which nobody can catch."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
