"""Start Python programs as child processes, several at a time, none of which outlives this one."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

PACKAGE_ROOT = Path(__file__).parents[1]  # the folder that holds megalr/
POLL_SECONDS = 0.1
PR_SET_PDEATHSIG = 1  # Linux: the signal that a process gets when its parent dies
# Variables of a launcher that this program may itself run under. They are not inherited: each child is a new group.
NOT_INHERITED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
# glibc returns large freed blocks to the kernel, which hands them out again page by page, zeroed. For the tiny model,
# whose logits are tens of megabytes, that is a seventh of a run's time.
KEEP_FREED_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}


@dataclass(frozen=True)
class Ended:
    """A program that has ended.

    Attributes:
        name: its name.
        code: its exit code; with several processes, that of the first one that failed. -9 (SIGKILL) after a timeout.
        seconds: how long it ran.
        log: the file with everything it printed.
    """

    name: str
    code: int
    seconds: float
    log: Path


def run_processes(
    commands: Mapping[str, Sequence[str]],
    folder: Path,
    jobs: int = 1,
    *,
    ranks: int = 1,
    gpus: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    timeout: float | None = None,
) -> Iterator[Ended]:
    """Run Python programs in turn, ``jobs`` at a time, each with one thread, and yield each one when it has ended.

    Programs that still run are killed when the caller stops iterating, when it fails, and when this process dies.

    Args:
        commands: arguments for the Python interpreter, by the program's name.
        folder: gets one file per program with everything it prints.
        jobs: how many programs run at a time.
        ranks: processes of each program. With more than one they get the variables that ``torchrun`` sets.
        gpus: the GPUs to use, ``jobs * ranks`` of them, as CUDA_VISIBLE_DEVICES names them. If empty, the programs
            choose.
        environment: variables to set besides, e.g. ``{"PYTHONPATH": python_path(...)}``.
        timeout: seconds after which a program is killed; None for no limit.
    """
    waiting, running = list(commands.items()), list[_Program]()
    slots = list(range(jobs))
    try:
        while waiting or running:
            while waiting and slots:
                slot = slots.pop(0)
                visible = gpus[slot * ranks : (slot + 1) * ranks]
                name, command = waiting.pop(0)
                running.append(_Program(name, command, folder / f"{name}.log", slot, ranks, visible, environment or {}))
            ended = [program for program in running if program.has_ended(timeout)]
            for program in ended:
                running.remove(program)
                slots.append(program.slot)
                yield Ended(program.name, program.code, program.seconds, program.log)
            if not ended:
                time.sleep(POLL_SECONDS)
    finally:
        for program in running:
            program.kill()


def python_path(*roots: Path) -> str:
    """A PYTHONPATH with which a child process imports the megalr of this process.

    Args:
        roots: further folders to import from.
    """
    folders = dict.fromkeys(map(str, (*roots, PACKAGE_ROOT)))
    return os.pathsep.join([*folders, *filter(None, [os.environ.get("PYTHONPATH")])])


def die_with_parent() -> Callable[[], object] | None:
    """A ``preexec_fn`` with which Linux kills a child when this process dies, even by SIGKILL."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class _Program:
    """A program that runs, in one process or several."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log: Path,
        slot: int,
        ranks: int,
        gpus: Sequence[str],
        environment: Mapping[str, str],
    ) -> None:
        self.name, self.log, self.slot, self.code = name, log, slot, 0
        self._since = time.monotonic()
        self._processes: list[subprocess.Popen[bytes]] = []
        inherited = {key: value for key, value in os.environ.items() if key not in NOT_INHERITED}
        variables = {**inherited, "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path(), **environment}
        if gpus:
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        if ranks > 1:
            variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
            variables |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks)}
        with log.open("wb") as file:
            for rank in range(ranks):
                if ranks > 1:
                    variables |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                process = subprocess.Popen(
                    [sys.executable, *command],
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=variables,
                    start_new_session=True,  # Ctrl-C is for this program, which then kills them
                    preexec_fn=die_with_parent(),  # noqa: PLW1509  (one system call, which takes no lock)
                )
                self._processes.append(process)

    @property
    def seconds(self) -> float:
        """How long it has run."""
        return time.monotonic() - self._since

    def has_ended(self, timeout: float | None) -> bool:
        """Whether all processes are gone. If one has failed, or the time is up, the others are killed."""
        codes = [process.poll() for process in self._processes]
        self.code = self.code or next((code for code in codes if code), 0)
        late = timeout is not None and self.seconds > timeout
        if None in codes and (self.code or late):
            self.kill()
            self.code = self.code or -signal.SIGKILL
            return True
        return None not in codes

    def kill(self) -> None:
        """Kill what still runs, and what it has started."""
        for process in self._processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
