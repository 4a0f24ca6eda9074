"""SIGTERM, SIGUSR1, SIGHUP and Ctrl-C as a request to stop after the current step, and what launchers make of them.

SIGUSR1 is what queues such as SLURM send to warn of the end, SIGHUP what comes when a terminal is gone; under nohup it
is ignored, and stays so. A run that was stopped by one of them, by SIGTERM or because its launcher is gone ends with
code 75, "try again"; after Ctrl-C with 0. What happens around a rank, with DeepSpeed 0.19 and torch 2.13:

- Ctrl-C reaches every process of ``deepspeed``: ranks get SIGINT from the terminal, and SIGTERM from their
  launcher on top. Under ``torchrun`` they have sessions of their own and get one SIGINT from it. So a SIGTERM
  after a SIGINT is the same request, and so is a SIGINT that follows another within moments.
- Launchers kill ranks that are still there 30 seconds later.
- ``kill`` of the ``deepspeed`` command itself is passed on to nobody: the ranks notice that it is gone, also where it
  went before they were there to see it.
- SIGUSR1 ends ``deepspeed`` and ``torchrun`` themselves, at once, unless they were started with it ignored
  (``trap '' USR1``), which ranks undo for themselves, or ``torchrun`` with ``--signals-to-handle`` naming it.
- What a shell sees in the end: of plain ``python`` the rank's code; of ``deepspeed`` the code of the rank that ended
  first, which is that of all, or 143, 138 and 130 where SIGTERM, SIGUSR1 or Ctrl-C reached the command itself; of
  ``torchrun`` 1 for whatever its ranks ended with, also where it was asked to stop itself, and 138 after SIGUSR1.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

import psutil  # type: ignore[import-untyped]

TRY_AGAIN = os.EX_TEMPFAIL  # 75: the exit code of a run that was stopped and can go on
_REQUESTS = tuple(
    number
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN
)
_SAME_REQUEST = 1.0  # seconds
LAUNCHER = "MEGALR_LAUNCHER"  # the variable in which `megalr pretrain` tells ranks its process id, which it keeps
_LOOK_SECONDS = 1.0
_OF_DEEPSPEED = ("CROSS_RANK", "CROSS_SIZE")  # variables that its launcher sets, and torchrun does not
_RUNNERS = ("deepspeed", "ds", "deepspeed.launcher.runner")  # what its command is called
_NOBODY = -1  # no process has this parent

_launchers_at_start: list[tuple[int, int]] = []
_may_end_at_once = threading.Event()  # cleared while there is something to save


def end_at_once_when_asked() -> None:
    """Make SIGTERM, SIGUSR1 and SIGHUP end this process with "try again" until there is something worth saving.

    Also while it waits in a library for others, when no handler of Python's is called: a thread does it, which the
    interpreter tells of signals through a pipe. Processes that are forked off are as if this had not been called.
    """
    told, tell = os.pipe()
    os.set_blocking(tell, False)
    for number in _REQUESTS:
        signal.signal(number, lambda number, frame: None)
    signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
    threading.Thread(target=_end_when_told, args=(told,), daemon=True, name="megalr-signals").start()
    # A signal for a process that is forked off must not come before it is one of its own: the pipe is shared.
    os.register_at_fork(before=_hold_requests, after_in_parent=_let_requests, after_in_child=_forget_requests)


def _end_when_told(told: int) -> None:
    while number := os.read(told, 1):
        if number[0] in _REQUESTS:
            os._exit(TRY_AGAIN)


def _hold_requests() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, _REQUESTS)


def _let_requests() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _REQUESTS)


def _forget_requests() -> None:
    signal.set_wakeup_fd(-1)
    for number in _REQUESTS:
        signal.signal(number, signal.SIG_DFL)
    _let_requests()


def end_with_launcher() -> None:
    """Have the end of the launcher end this process with "try again" until there is something worth saving.

    To be called as early as can be: which processes belong to the launcher is seen only while they live.
    """
    _launchers_at_start[:] = _launchers()
    os.environ.pop(LAUNCHER, None)  # programs that this one starts have launchers of their own
    if _launchers_at_start:
        _may_end_at_once.set()
        threading.Thread(target=_end_when_left, daemon=True, name="megalr-launcher").start()


def _end_when_left() -> None:
    while not (_may_end_at_once.is_set() and _is_gone(_launchers_at_start)):
        time.sleep(_LOOK_SECONDS)
    os._exit(TRY_AGAIN)


class StopRequest:
    """Notes a request to stop. A context manager: handlers are installed inside and put back afterwards.

    A second Ctrl-C ends the process at once, with code 130. Once there was a request, later ones but Ctrl-C are
    ignored to the end: launchers repeat them rank by rank, and ranks that were asked to stop end with their own code.
    """

    def __init__(self, tell: Callable[[str], None] = lambda reason: None) -> None:
        """
        Args:
            tell: called once, with the reason, when a request is noticed: in a signal's handler, that is anywhere.
        """
        self._tell = tell
        self._reason: str | None = None
        self._first_interrupt: float | None = None
        self._previous: dict[int, Any] = {}
        self._wakeup = -1
        self._launchers = _launchers_at_start or _launchers()
        self._at_once = False  # whether a launcher's end would end this process outside

    @property
    def reason(self) -> str | None:
        """Why this process should stop, such as "SIGTERM", or None."""
        if self._reason is None and _is_gone(self._launchers):
            self._reason = "the launcher is gone"
            self._tell(self._reason)
        return self._reason

    def __enter__(self) -> StopRequest:
        self._at_once = _may_end_at_once.is_set()
        _may_end_at_once.clear()
        for number in (*_REQUESTS, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._note)
        self._wakeup = signal.set_wakeup_fd(-1)  # see end_at_once_when_asked
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._reason is not None:
            for number in _REQUESTS:
                signal.signal(number, signal.SIG_IGN)
        elif self._at_once:
            _may_end_at_once.set()
        signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._first_interrupt is None:
                self._first_interrupt = now
            elif now - self._first_interrupt > _SAME_REQUEST:
                os._exit(130)
        if self._reason is None:
            self._reason = signal.Signals(number).name
            self._tell(self._reason)


def exit_code(reason: str) -> int:
    """What a run that was stopped for this reason should end with: 0 where somebody sat there and pressed Ctrl-C."""
    return 0 if reason == signal.SIGINT.name else TRY_AGAIN


def agreed_reason(reasons: Iterable[str | None]) -> str | None:
    """One reason of those that ranks have: Ctrl-C if any had that, for which launchers send SIGTERM, else the first."""
    found = [reason for reason in reasons if reason is not None]
    return signal.SIGINT.name if signal.SIGINT.name in found else next(iter(found), None)


def _launchers() -> list[tuple[int, int]]:
    """Pairs (child, parent) of process ids that stay so while the launcher lives; empty without a launcher.

    A parent that is a shell doesn't count: it may end and leave the run behind on purpose (nohup). Of a launcher that
    is gone already there is a pair that never was.
    """
    me = os.getpid()
    parent = os.getppid()
    words = _command(parent)
    if "deepspeed.launcher.launch" in words[:4]:
        return [(me, parent), *_runner_of(parent, words)]
    by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    if (by_torchrun or all(name in os.environ for name in _OF_DEEPSPEED)) and _takes_in_orphans(parent, words):
        return [(me, _NOBODY)]
    return [(me, parent)] if by_torchrun else []


def _runner_of(launch: int, words: list[str]) -> list[tuple[int, int]]:
    """DeepSpeed's process on this node, and the command that has started it, where that is on this node as well."""
    is_local = not any(word.startswith("--node_rank") for word in words)
    told = os.environ.get(LAUNCHER, "")
    if is_local and told.isdecimal():
        return [(launch, int(told))]
    runner = _parent(launch)
    command = _command(runner)
    if any(os.path.basename(word) in _RUNNERS for word in command[:4]):
        return [(launch, runner)]
    return [(launch, _NOBODY)] if is_local and _takes_in_orphans(runner, command) else []


def _takes_in_orphans(process: int, words: list[str]) -> bool:
    """Whether this is who becomes the parent of processes that have lost theirs; a container's first may be a launcher.

    Args:
        process: its id.
        words: its command line.
    """
    program = os.path.basename(words[0]) if words else ""
    return program == "systemd" or (process == 1 and not program.startswith("python"))


def _is_gone(pairs: list[tuple[int, int]]) -> bool:
    return any(not _is_child(child, parent) for child, parent in pairs)


def _is_child(child: int, parent: int) -> bool:
    return (os.getppid() if child == os.getpid() else _parent(child)) == parent


def _parent(process: int) -> int:
    try:
        return int(psutil.Process(process).ppid())
    except psutil.Error:
        return 0


def _command(process: int) -> list[str]:
    try:
        return list(psutil.Process(process).cmdline())
    except psutil.Error:
        return []
