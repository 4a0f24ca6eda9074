"""The budget of the tests: sums over workers, the slowest, and a session that fails for its time alone."""

import re
import sys

import pytest

from tests.processes import run

TESTS = """
import time, pytest

@pytest.fixture
def slow_to_make():
    time.sleep(0.3)
    yield
    time.sleep(0.3)

def test_with_a_fixture(slow_to_make):
    pass

@pytest.mark.parametrize("i", range(30))
def test_quick(i):
    time.sleep(0.2 * (i == 7))
"""


@pytest.mark.parametrize("workers", [[], ["-n", "2"]])
@pytest.mark.parametrize(("limit", "code"), [("1000", 0), ("0.5", 1)])
def test_a_session_is_summed_up_and_limited(tmp_path, workers, limit, code):
    (tmp_path / "test_it.py").write_text(TESTS)
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "tests.budget", *workers, tmp_path]

    done = run([*words, "--budget"], cwd=tmp_path, check=False, env={"MEGALR_TEST_BUDGET_S": limit})

    assert "31 passed" in done.stdout
    assert done.code == code
    assert "slowest 20 of 31 tests" in done.stdout
    rows = re.findall(r"^ *(\d+\.\d) s  (\S+)$", done.stdout, re.MULTILINE)
    assert len(rows) == 20
    (first, with_a_fixture), (second, quick) = rows[:2]
    assert with_a_fixture.endswith("::test_with_a_fixture") and float(first) >= 0.6
    assert quick.endswith("::test_quick[7]") and float(second) >= 0.2
    verdict = "EXCEEDS" if code else "is within"
    assert re.search(rf"\d+ s for the session {verdict} the budget of {float(limit):.0f} s", done.stdout)


def test_other_sessions_have_no_budget(tmp_path):
    (tmp_path / "test_it.py").write_text("def test_it(): pass")
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "tests.budget", tmp_path]
    assert "budget" not in run(words, cwd=tmp_path, env={"MEGALR_TEST_BUDGET_S": "0"}).stdout
