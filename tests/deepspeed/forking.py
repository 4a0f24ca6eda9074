"""Runs groups of processes that are meant to die: forked from one that has imported everything, in milliseconds."""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import multiprocessing
import os
import select
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

from megalr.processes import die_with_parent
from tests import warm
from tests.deepspeed.harness import ENVIRONMENT, ROOT

LIMIT = 60.0  # seconds for a group to end
READ_AT_ONCE = 1 << 16
SHOWN = 1000  # characters; what is written to a pipe at once is not mixed with what others write


@dataclass(frozen=True)
class Killing:
    """When to kill.

    Attributes:
        cue: the report after which the time is counted; the first that has all of these.
        seconds: until the signal.
        ranks: who gets it.
    """

    cue: dict[str, Any]
    seconds: float
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Ended:
    """What became of a group.

    Attributes:
        codes: exit codes in rank order; negative for a signal.
        reports: what the ranks have said, in the order of saying.
        hung: whether processes were left at the end of the time.
    """

    codes: list[int]
    reports: list[dict[str, Any]]
    hung: bool

    def of(self, key: str, rank: int | None = None) -> list[Any]:
        """What was said under a word, by one rank or by any."""
        return [report[key] for report in self.reports if key in report and rank in (None, report["rank"])]


class Forker:
    """The process that forks; to be used as a context."""

    def __init__(self) -> None:
        ours, theirs = multiprocessing.Pipe()
        with theirs:
            program = f"from tests.deepspeed.forking import main; main({theirs.fileno()})"
            self._process = warm.start(
                [sys.executable, "-c", program],
                cwd=ROOT,
                env={**os.environ, **ENVIRONMENT},
                pass_fds=[theirs.fileno()],
            )
        self._connection = ours

    def __enter__(self) -> Forker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # what it has forked goes with it
        self._process.wait()
        self._connection.close()

    def run(self, function: str, world_size: int, *args: Any, kill: Killing | None = None, **kwargs: Any) -> Ended:
        """``function(report, rank, world_size, rendezvous, *args, **kwargs)`` on processes that form no group yet.

        Args:
            function: "package.module:function"; ``report(word=value, ...)`` says something that outlives its process.
            world_size: how many processes.
            kill: by whom and when they are killed from outside.
        """
        self._connection.send((function, world_size, args, kwargs, kill))
        ended: Ended = self._connection.recv()
        return ended


def main(fd: int) -> None:
    """Fork what is asked for until the other end is closed."""
    importlib.import_module("tests.deepspeed.crashing")
    gc.freeze()
    connection: Connection[Any, Any] = Connection(fd)
    while True:
        try:
            function, world_size, args, kwargs, kill = connection.recv()
        except EOFError:
            return
        module, _, name = function.partition(":")
        target = getattr(importlib.import_module(module), name)
        with tempfile.TemporaryDirectory(prefix="forked-") as folder:
            connection.send(_run(target, world_size, str(Path(folder) / "rendezvous"), args, kwargs, kill))


def _run(target: Any, world_size: int, rendezvous: str, args: Any, kwargs: Any, kill: Killing | None) -> Ended:
    reading, writing = os.pipe()
    processes = [
        multiprocessing.get_context("fork").Process(
            target=_child, args=(target, writing, rank, world_size, rendezvous, args, kwargs)
        )
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    os.close(writing)
    reports: list[dict[str, Any]] = []
    rest, deadline, hung = b"", time.monotonic() + LIMIT, False
    while True:
        if not select.select([reading], [], [], max(0.0, deadline - time.monotonic()))[0]:
            hung = True
            break
        block = os.read(reading, READ_AT_ONCE)
        if not block:
            break
        *lines, rest = (rest + block).split(b"\n")
        reports += [json.loads(line) for line in lines]
        if kill is not None and any(kill.cue.items() <= report.items() for report in reports):
            select.select([], [], [], kill.seconds)  # a moment is a time
            for rank in kill.ranks:
                processes[rank].kill()
            kill = None
    os.close(reading)
    for process in processes:
        if hung:
            process.kill()
        process.join()
    return Ended([process.exitcode or 0 for process in processes], reports, hung)


def _child(target: Any, writing: int, rank: int, world_size: int, rendezvous: str, args: Any, kwargs: Any) -> None:
    with_parent = die_with_parent()
    if with_parent is not None:
        with_parent()

    def report(**words: Any) -> None:
        os.write(writing, json.dumps({"rank": rank, **words}).encode() + b"\n")  # short, hence at once

    try:
        target(report, rank, world_size, rendezvous, *args, **kwargs)
    except Exception as error:
        report(raised=type(error).__name__, message=str(error)[:SHOWN], trace=traceback.format_exc()[-SHOWN:])
        sys.exit(1)  # which waits for threads, as the end of any process does
