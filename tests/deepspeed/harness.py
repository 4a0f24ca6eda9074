"""Runs functions on several processes that form one torch.distributed group; brings back what they return.

Starting a group takes a second, so a :class:`RankPool` keeps its processes and runs many functions in them; tests
take one from the ``ranks`` fixture. :func:`run_ranks` is a pool for a single call, for what needs fresh processes or
an environment of its own.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from tests import warm
from tests.warm import ROOT, WarmProcess

START_TIMEOUT = 120.0  # seconds for imports and rendezvous, on a machine that is busy
LAST_WORDS = 3.0  # seconds that the other ranks have to report once one has failed
SHOWN_CHARACTERS = 20_000  # of each rank's output in an error

# The CPU and gloo over loopback, whatever the machine has, with one thread a process.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "MASTER_ADDR": "127.0.0.1",
    **({"GLOO_SOCKET_IFNAME": "lo"} if Path("/sys/class/net/lo").exists() else {}),
}


class RankError(AssertionError):
    """A rank failed, died or did not answer in time; the message holds every rank's traceback and output."""


def run_ranks(
    function: str,
    world_size: int,
    *args: Any,
    timeout: float = 120.0,
    env: dict[str, str] | None = None,
    **kwargs: Any,
) -> list[Any]:
    """``function(*args, **kwargs)`` on ``world_size`` fresh processes; see :meth:`RankPool.run`."""
    with RankPool(world_size, env=env) as pool:
        return pool.run(function, *args, timeout=timeout, **kwargs)


class RankPool:
    """``world_size`` processes in one gloo group, started at the first call and restarted after a failure.

    Args:
        world_size: how many processes.
        env: environment variables to add to, or to replace in, this process's own and :data:`ENVIRONMENT`.
    """

    def __init__(self, world_size: int, *, env: dict[str, str] | None = None) -> None:
        self.world_size = world_size
        self._env = env or {}
        self._ranks: list[_Rank] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> RankPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def run(self, function: str, *args: Any, timeout: float = 120.0, **kwargs: Any) -> list[Any]:
        """Call a function on every rank.

        Before each call the random seeds are set to 0; after it the environment and the working folder are
        put back.

        Args:
            function: "package.module:function", importable from the repository's root.
            *args, **kwargs: picklable; tensors are copied.
            timeout: seconds after which the processes are killed; starting them is not counted.

        Returns:
            What the function returned, in rank order.

        Raises:
            RankError: when a rank raised, died or took too long. The next call starts new processes.
        """
        if not self._ranks:
            self._start()
        request = pickle.dumps((function, args, kwargs))
        for rank in self._ranks:
            rank.begin(request)
        return self._collect(function, timeout)

    def pids(self) -> list[int]:
        """The processes' ids in rank order; none before the first call and after a failure."""
        return [rank.process.pid for rank in self._ranks]

    def close(self) -> None:
        """Kill the processes and what they started."""
        for rank in self._ranks:
            rank.kill()
        self._ranks = []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        folder = Path(self._folder.name)
        for rank in range(self.world_size):
            env = {
                **os.environ,
                **ENVIRONMENT,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(self.world_size),
                "LOCAL_SIZE": str(self.world_size),
                **self._env,
            }
            self._ranks.append(_Rank.start(rank, folder, env))
        self._collect("the start of the processes", START_TIMEOUT)

    def _collect(self, what: str, timeout: float) -> list[Any]:
        """Wait for every rank's answer; kill them all and raise when one fails or the time is up."""
        deadline = time.monotonic() + timeout
        pending = list(self._ranks)
        problem = ""
        try:
            while pending:
                ready = wait([rank.connection for rank in pending], max(0.0, deadline - time.monotonic()))
                if not ready:
                    problem = problem or f"no answer within {timeout:g} s"
                    break
                for rank in [rank for rank in pending if rank.connection in ready]:
                    pending.remove(rank)
                    rank.receive()
                    if rank.error and not problem:
                        problem = f"rank {rank.number} failed"
                        # The others may have failed too, or may wait for this one for ever.
                        deadline = min(deadline, time.monotonic() + LAST_WORDS)
            if not problem:
                return [rank.result for rank in self._ranks]
            for rank in pending:
                rank.error = "killed: it had not answered"
            raise RankError("\n".join([f"{what} on {self.world_size} ranks: {problem}", *self._reports()]))
        except BaseException:  # also Ctrl-C: answers of this call must not meet the next one
            self.close()
            raise

    def _reports(self) -> Sequence[str]:
        return [
            f"--- rank {rank.number}: {rank.error or 'returned'}\n{rank.output()[-SHOWN_CHARACTERS:]}"
            for rank in self._ranks
        ]


@dataclass
class _Rank:
    """One process: its end of the connection, its output, its last answer."""

    number: int
    process: WarmProcess | subprocess.Popen[bytes]
    connection: Connection[bytes, bytes]
    log: BinaryIO
    log_start: int = 0
    result: Any = field(default=None, repr=False)
    error: str = ""

    @classmethod
    def start(cls, number: int, folder: Path, env: dict[str, str]) -> _Rank:
        ours, theirs = Pipe()
        log = open(folder / f"rank{number}.log", "a+b")  # noqa: SIM115  (closed by kill)
        with theirs:
            words = [sys.executable, "-m", "tests.deepspeed.worker", str(theirs.fileno()), str(folder / "rendezvous")]
            process = warm.start(
                words,
                cwd=ROOT,
                env=env,
                stdin=subprocess.PIPE,  # held open for as long as this process lives; see the worker
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
            )
        return cls(number, process, ours, log)

    def begin(self, request: bytes) -> None:
        self.result, self.error = None, ""
        self.log_start = self.log.seek(0, os.SEEK_END)
        with contextlib.suppress(OSError):  # it has died since: receive() will say so
            self.connection.send_bytes(request)

    def receive(self) -> None:
        try:
            succeeded, answer = pickle.loads(self.connection.recv_bytes())
        except (EOFError, OSError):
            self.error = f"died with exit code {self.process.wait()}"
            return
        if succeeded:
            self.result = answer
        else:
            self.error = f"raised\n{answer}"

    def output(self) -> str:
        """What the process has printed since the call began."""
        self.log.seek(self.log_start)
        return self.log.read().decode(errors="replace")

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.connection.close()
        self.log.close()
