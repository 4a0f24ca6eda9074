"""Processes of tests: what they print is told, and no test waits for one without end."""

import os
import re
import signal
import sys
import time

import pytest

from tests.processes import ROOT, ProcessError, python, run, started

# A child keeps the output open.
LINGERS = {"waits": "echo here; sleep 60 & echo child; wait", "ends": "echo here; sleep 60 & echo child"}


def gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_what_a_program_prints_and_ends_with():
    done = run(python("import sys; print(1); print(2, file=sys.stderr); sys.exit(3)"), check=False)
    assert (done.code, done.stdout, done.stderr, done.output) == (3, "1\n", "2\n", "1\n2\n")
    with pytest.raises(ProcessError, match=r"(?s)exit code 3.*1\n2"):
        run(python("import sys; print(1); print(2, file=sys.stderr); sys.exit(3)"))


def test_a_program_runs_in_this_tree_and_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("OURS", "kept")
    program = "import os, megalr; print(megalr.__file__, os.environ['OURS'], os.environ['THEIRS'], os.getcwd())"
    done = run(python(program), cwd=tmp_path, env={"THEIRS": "added"})
    assert done.stdout.split() == [str(ROOT / "megalr/__init__.py"), "kept", "added", str(tmp_path)]


@pytest.mark.parametrize("how", LINGERS)
def test_at_its_limit_everything_is_killed_and_told(how):
    began = time.monotonic()
    with pytest.raises(ProcessError, match=r"(?s)did not end within 2 s.*here\nchild"):
        run(["sh", "-c", LINGERS[how]], limit=2)
    assert time.monotonic() - began < 30


def test_what_is_printed_is_waited_for():
    with started(["sh", "-c", "echo ready; sleep 60"], limit=3) as process:
        assert "ready" in process.read_until("ready")
        with pytest.raises(ProcessError, match=r"(?s)printing 'more': not within 3 s.*ready"):
            process.read_until("more")
    assert gone(process.pid)
    with started(python("print('last words')")) as process:
        assert process.read_until("words").strip() == "last words"
    with (
        started(python("import sys; print('so far'); sys.exit(4)")) as process,
        pytest.raises(ProcessError, match=r"(?s)ended with exit code 4 before printing 'more'.*so far"),
    ):
        process.read_until("more")


def test_a_condition_is_waited_for_as_long_as_the_process_lives(tmp_path):
    program = "import pathlib, sys, time; pathlib.Path(sys.argv[1]).touch(); time.sleep(60)"
    with started(python(program, tmp_path / "made")) as process:
        process.wait_for((tmp_path / "made").exists)
        assert not process.watch(0.1)
        process.signal_group(signal.SIGTERM)
        assert process.wait().code == -signal.SIGTERM
        assert process.watch(60)
    with started(python("")) as process, pytest.raises(ProcessError, match="ended with exit code 0 before a file"):
        process.wait_for((tmp_path / "never").exists, "a file")


def test_two_streams_or_one():
    program = "import sys; [print(i, file=(sys.stdout, sys.stderr)[i % 2], flush=True) for i in range(4)]"
    with started(python(program), one_stream=True) as process:
        done = process.wait()
    assert (done.stdout.split(), done.stderr) == (["0", "1", "2", "3"], "")
    assert sys.executable in python(program)


def test_no_test_starts_a_process_by_itself():
    """What starts one has a limit, kills the whole group, and says what it printed."""
    may = {"processes.py", "warm.py", "test_process_limits.py", "test_harness.py"}
    starts = re.compile(
        r"\bsubprocess\.(run|Popen|call|check_call|check_output)\(|\bos\.(system|popen|fork|spawn\w+)\("
    )
    files = [file for file in (ROOT / "tests").rglob("*.py") if file.name not in may and "mutants" not in file.parts]
    assert [str(file) for file in files if starts.search(file.read_text())] == []
