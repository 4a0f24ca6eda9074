"""What both launchers do around their work: start, and end with the right words and the right exit code."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import TypeVar

from megalr.agreement import is_first
from megalr.errors import UserError
from megalr.train.interruption import end_with_launcher
from megalr.train.quiet import quieten, show_builds
from megalr.train.ranks import AgreedError, Ranks, start_ranks, stop_ranks, world_size_from_environment

T = TypeVar("T")

USER_ERROR_CODE = 2


def run_program(
    argv: Sequence[str], parse: Callable[[Sequence[str]], T], work: Callable[[T, Ranks], int | None]
) -> int:
    """Parse the command line, join the other processes, work.

    Args:
        argv: the command line without the program's name.
        parse: reads it, raising a UserError for what it cannot read.
        work: does the rest, and may say with which exit code to end, the same on all ranks.

    Returns:
        The exit code: that one, or 0, or 2 after a UserError, whose message alone is printed, once.
    """
    end_with_launcher()
    # Until there is something worth saving, Ctrl-C ends the process without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    ranks: Ranks | None = None
    try:
        arguments, error = _parse(argv, parse)
        if error is not None and world_size_from_environment() == 1:
            raise error
        if not getattr(arguments, "verbose", False):
            quieten(first=is_first())
        if is_first():
            show_builds()
        ranks = start_ranks()
        with ranks.together():
            if error is not None:
                raise error
        assert arguments is not None
        code = work(arguments, ranks) or 0
        if code:
            _wait_for_all(ranks)
        stop_ranks()
        return code
    except UserError as found:
        _complain(found, ranks)
        return USER_ERROR_CODE


def _parse(argv: Sequence[str], parse: Callable[[Sequence[str]], T]) -> tuple[T | None, UserError | None]:
    try:
        return parse(argv), None
    except UserError as error:
        return None, error


def _complain(error: UserError, ranks: Ranks | None) -> None:
    """Print the message: rank 0 for all when they have agreed, else whoever has found it."""
    agreed = isinstance(error, AgreedError)
    if ranks is None or ranks.is_first or not agreed:
        if os.environ.get("MEGALR_TRACEBACK"):
            traceback.print_exception(error)
        print(f"error: {error}", file=sys.stderr, flush=True)
    if ranks is not None and agreed:
        _wait_for_all(ranks)
        stop_ranks()


def _wait_for_all(ranks: Ranks) -> None:
    """A launcher ends the others as soon as one process has failed: not before all is said, and not by its signal."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ranks.barrier()
