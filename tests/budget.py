"""What the tests of a session take together: printed with the slowest of them, and limited under ``--budget``.

The limit is for the wall time of the whole session, its collection and all workers included, on two cores: what
somebody waits who runs ``make test`` or `.ci/run`, installation aside. Seconds of single tests are those of their
set-up, call and tear-down on whichever worker has run them.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict

import pytest

SECONDS = 15 * 60.0
SHOWN = 20


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare ``--budget``."""
    words = f"fail if the session takes longer than {SECONDS:g} s, or MEGALR_TEST_BUDGET_S; print the slowest {SHOWN}"
    parser.addoption("--budget", action="store_true", help=words)


def pytest_configure(config: pytest.Config) -> None:
    """Count in the process that hears of every test, not in xdist's workers."""
    if config.getoption("--budget") and not hasattr(config, "workerinput"):
        limit = float(os.environ.get("MEGALR_TEST_BUDGET_S", SECONDS))
        config.pluginmanager.register(Budget(limit), "budget")


class Budget:
    """Sums up.

    Args:
        limit: seconds for the session.
    """

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._seconds: dict[str, float] = defaultdict(float)
        self._began = time.monotonic()
        self._took = 0.0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add a phase of a test."""
        self._seconds[report.nodeid] += report.duration

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Fail a session that took too long."""
        self._took = time.monotonic() - self._began
        if self._took > self._limit and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print the sums and the slowest."""
        write, section = terminalreporter.write_line, terminalreporter.section
        section(f"slowest {SHOWN} of {len(self._seconds)} tests")
        for name, seconds in sorted(self._seconds.items(), key=lambda item: -item[1])[:SHOWN]:
            write(f"{seconds:7.1f} s  {name}")
        exceeded = self._took > self._limit
        verdict = "EXCEEDS" if exceeded else "is within"
        together = sum(self._seconds.values())
        words = f"{self._took:.0f} s for the session {verdict} the budget of {self._limit:.0f} s"
        write(f"{words}; the tests' own sum is {together:.0f} s", red=exceeded, green=not exceeded)
