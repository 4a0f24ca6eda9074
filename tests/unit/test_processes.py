"""Programs in child processes: their environment, and that none outlives its parent."""

from pathlib import Path

import megalr
from megalr.processes import python_path, run_processes
from tests.unit.comparison_recipes import running

SAYS_WHO_IT_IS = """
import os, sys, time
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "CUDA_VISIBLE_DEVICES")
print(*(os.environ.get(name) for name in names), flush=True)
if sys.argv[1] == "fails":
    sys.exit(3) if os.environ["RANK"] == "1" else time.sleep(600)
"""


def test_runs_of_several_processes_have_gpus_of_their_own(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(SAYS_WHO_IT_IS)
    commands = {name: [str(program), "works"] for name in ("a", "b", "c")}
    ended = list(run_processes(commands, tmp_path, 2, ranks=2, gpus=["4", "5", "6", "7"]))
    assert [one.code for one in ended] == [0, 0, 0]
    lines = {one.name: sorted(one.log.read_text().splitlines()) for one in ended}
    assert lines["a"] == ["0 0 2 4,5", "1 1 2 4,5"]
    assert lines["b"] == ["0 0 2 6,7", "1 1 2 6,7"]
    (alone,) = run_processes({"d": [str(program), "works"]}, tmp_path, 1)
    assert alone.log.read_text() == "None None None None\n"


def test_one_process_that_fails_ends_its_run(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(SAYS_WHO_IT_IS)
    (ended,) = run_processes({"a": [str(program), "fails"]}, tmp_path, 1, ranks=2)
    assert ended.code == 3
    assert not running(str(program))


def test_a_program_that_takes_too_long_is_killed(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(SAYS_WHO_IT_IS)
    commands = {"a": [str(program), "works"], "b": ["-c", f"import time; time.sleep(600)  # {program}"]}
    quick, slow = run_processes(commands, tmp_path, timeout=2)
    assert (quick.name, quick.code) == ("a", 0)
    assert (slow.name, slow.code) == ("b", -9)
    assert 2 < slow.seconds < 60
    assert not running(str(program))


def test_children_import_this_megalr_and_what_is_added(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    root = str(Path(megalr.__file__).parents[1])
    assert python_path() == f"{root}:/elsewhere"
    assert python_path(tmp_path, Path(root)) == f"{tmp_path}:{root}:/elsewhere"
    says = ["-c", "import megalr, os; print(megalr.__file__, os.environ['OMP_NUM_THREADS'], os.environ['A'])"]
    (ended,) = run_processes({"a": says}, tmp_path, environment={"A": "1"})
    assert ended.log.read_text() == f"{megalr.__file__} 1 1\n"
