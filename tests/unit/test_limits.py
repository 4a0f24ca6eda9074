"""A test that waits too long fails, also where Python is not asked."""

import sys

import pytest

from tests.processes import run

WAITS = """
import threading

def test_waits_in_python():
    threading.Event().wait()

def test_goes_on():
    pass
"""
NATIVE = """
import signal, threading

def test_waits_for_good():
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
    threading.Event().wait()
"""


@pytest.fixture
def pytest_on(tmp_path):
    def _run(text):
        file = tmp_path / "test_it.py"
        file.write_text(text)
        words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "tests.limits", file]
        return run(words, cwd=tmp_path, check=False, env={"MEGALR_TEST_LIMIT_S": "1", "MEGALR_TEST_GRACE_S": "1"})

    return _run


def test_a_test_that_waits_fails_and_the_next_runs(pytest_on):
    done = pytest_on(WAITS)
    assert done.code == 1
    assert "test_waits_in_python took longer than 1 s" in done.stdout
    assert "1 failed, 1 passed" in done.stdout


def test_a_process_that_cannot_be_interrupted_ends(pytest_on):
    done = pytest_on(NATIVE)
    assert done.code == 1
    assert "Timeout" in done.stderr and "test_waits_for_good" in done.stderr
