"""Processes that a test starts: each has a limit, says what it printed, and leaves nothing behind.

A test never waits without end: at its limit the process and everything in its group is killed, and the test fails
with all that was printed. :func:`run` is for a program that ends by itself, :func:`started` for one that is watched,
signalled or killed on the way.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megalr.processes import die_with_parent
from tests.warm import WarmProcess
from tests.warm import start as start_warm

ROOT = Path(__file__).parents[1]
LIMIT = 120.0  # seconds; a busy machine takes a minute for the imports of a few processes
SHOWN_CHARACTERS = 20_000  # of what was printed, in an error
POLL_SECONDS = 0.05


class ProcessError(AssertionError):
    """A process failed, or did not do in time what was waited for; the message holds what it printed."""


@dataclass(frozen=True)
class Finished:
    """A process that has ended.

    Attributes:
        code: its exit code; negative for a signal.
        stdout: what it and its children wrote there.
        stderr: the same; empty where both went into one.
    """

    code: int
    stdout: str
    stderr: str = ""

    @property
    def output(self) -> str:
        """Everything that was printed."""
        return self.stdout + self.stderr


class Running:
    """A process in a group of its own, and its output.

    Attributes:
        pid: its id, and that of its group.
    """

    def __init__(self, process: subprocess.Popen[bytes] | WarmProcess, name: str, limit: float) -> None:
        self.pid = process.pid
        self._process, self._name = process, name
        self._deadline, self._limit = time.monotonic() + limit, limit
        self._printed: dict[int, bytearray] = {}
        self._open = selectors.DefaultSelector()
        for number, stream in enumerate((process.stdout, process.stderr)):
            self._printed[number] = bytearray()
            if stream is not None:
                self._open.register(stream, selectors.EVENT_READ, number)

    def send_signal(self, number: int) -> None:
        """To the process alone."""
        self._process.send_signal(number)

    def signal_group(self, number: int) -> None:
        """To the process and to everything in its group."""
        os.killpg(self.pid, number)

    def read_until(self, word: str) -> str:
        """Wait until ``word`` is printed, and return everything that has been printed."""
        self._wait_for(lambda: word in self._text(), f"printing {word!r}")
        return self._text()

    def wait_for(self, condition: Callable[[], object], what: str = "what was waited for") -> None:
        """Wait until a condition holds; that the process ends before is a failure."""
        self._wait_for(condition, what)

    def watch(self, seconds: float) -> bool:
        """Let it run for a time; returns whether it has ended."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self._process.poll() is None:
            self._pump(min(POLL_SECONDS, end - time.monotonic()))
        return self._process.poll() is not None

    def wait(self) -> Finished:
        """Wait for the end of the process and of everything that holds its output open."""
        while self._process.poll() is None or self._open.get_map():
            if time.monotonic() > self._deadline:
                raise self._error(f"did not end within {self._limit:g} s")
            self._pump()
        return Finished(self._process.returncode, *(text.decode(errors="replace") for text in self._printed.values()))

    def close(self) -> None:
        """Kill the group, and wait for the process."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        self._open.close()
        for stream in (self._process.stdout, self._process.stderr):
            if stream is not None:
                stream.close()

    def _wait_for(self, condition: Callable[[], object], what: str) -> None:
        while not condition():
            if self._process.poll() is not None and not self._open.get_map():
                if condition():  # its last words
                    return
                raise self._error(f"ended with exit code {self._process.returncode} before {what}")
            if time.monotonic() > self._deadline:
                raise self._error(f"{what}: not within {self._limit:g} s")
            self._pump()

    def _pump(self, seconds: float = POLL_SECONDS) -> None:
        """Read what is there, for at most some time."""
        if not self._open.get_map():
            time.sleep(max(0.0, seconds))
        for key, _ in self._open.select(max(0.0, seconds)):
            block = os.read(key.fd, 1 << 16)
            if block:
                self._printed[key.data] += block
            else:
                self._open.unregister(key.fileobj)

    def _text(self) -> str:
        return "".join(text.decode(errors="replace") for text in self._printed.values())

    def _error(self, what: str) -> ProcessError:
        return ProcessError(f"{self._name}: {what}\n{self._text()[-SHOWN_CHARACTERS:]}")


def run(
    command: Sequence[str | Path],
    *,
    check: bool = True,
    limit: float = LIMIT,
    cwd: Path = ROOT,
    env: Mapping[str, str | None] | None = None,
    one_stream: bool = False,
    warm: bool = False,
) -> Finished:
    """Run a program to its end.

    Args:
        command: its words.
        check: whether an exit code other than 0 is a failure.
        limit: seconds after which it is killed, which is a failure.
        cwd: its folder.
        env: variables to set beside those of :func:`environment`; None takes one away.
        one_stream, warm: as for :func:`started`.
    """
    with started(command, limit=limit, cwd=cwd, env=env, one_stream=one_stream, warm=warm) as running:
        finished = running.wait()
    if check and finished.code:
        raise ProcessError(f"{_name(command)}: exit code {finished.code}\n{finished.output[-SHOWN_CHARACTERS:]}")
    return finished


@contextlib.contextmanager
def started(
    command: Sequence[str | Path],
    *,
    limit: float = LIMIT,
    cwd: Path = ROOT,
    env: Mapping[str, str | None] | None = None,
    one_stream: bool = False,
    warm: bool = False,
) -> Iterator[Running]:
    """A program in a session of its own, all of which is killed at the end; see :func:`run`.

    Args:
        command, limit, cwd, env: as for :func:`run`.
        one_stream: whether standard output and error are one, in the order of printing.
        warm: whether this interpreter is forked rather than started; see tests/warm.py.
    """
    words, variables = [str(word) for word in command], environment(env or {})
    errors = subprocess.STDOUT if one_stream else subprocess.PIPE
    process: subprocess.Popen[bytes] | WarmProcess
    if warm:
        process = start_warm(words, cwd=cwd, env=variables, stdout=subprocess.PIPE, stderr=errors)
    else:
        process = subprocess.Popen(
            words,
            cwd=cwd,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
            preexec_fn=die_with_parent(),  # noqa: PLW1509  (one system call, which takes no lock)
        )
    running = Running(process, _name(command), limit)
    try:
        yield running
    finally:
        running.close()


def python(code: str, *arguments: object) -> list[str]:
    """The words that run code as a program."""
    return [sys.executable, "-c", code, *map(str, arguments)]


def environment(changes: Mapping[str, str | None]) -> dict[str, str]:
    """This process's own, with this tree first in the path of imports; an installation may be of another tree."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    changed = {**os.environ, "PYTHONPATH": path, **changes}
    return {name: value for name, value in changed.items() if value is not None}


def _name(command: Sequence[str | Path]) -> str:
    return " ".join(str(word)[:60] for word in command[:6])
