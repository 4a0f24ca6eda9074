"""No test runs for ever: at a limit it fails where it waits, and a process that cannot be interrupted is ended.

Processes that tests start have shorter limits of their own, which tell more; see tests/processes.py.
"""

from __future__ import annotations

import faulthandler
import os
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any

import pytest

SECONDS = 300  # for one test with its fixtures
SLOW_SECONDS = 1800
GRACE_SECONDS = 60  # for the test to notice; native code that waits does not


_stderr = pytest.StashKey[int]()


class TestTimeoutError(AssertionError):
    """A test has taken longer than its limit."""


def pytest_configure(config: pytest.Config) -> None:
    """Keep the standard error that tests' output is not captured from."""
    config.stash[_stderr] = os.dup(2)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[Any]:
    """Limit a test, its set-up and tear-down included."""
    limit = SLOW_SECONDS if item.get_closest_marker("slow") else SECONDS
    limit = int(os.environ.get("MEGALR_TEST_LIMIT_S", limit))
    grace = int(os.environ.get("MEGALR_TEST_GRACE_S", GRACE_SECONDS))

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise TestTimeoutError(f"{item.nodeid} took longer than {limit} s")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.alarm(limit)
    faulthandler.dump_traceback_later(limit + grace, exit=True, file=item.config.stash[_stderr])
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
