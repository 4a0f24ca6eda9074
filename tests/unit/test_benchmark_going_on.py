"""The comparison of methods when something goes wrong: runs that fail, benchmarks that are killed."""

import json
import shutil
import signal
import sys
from pathlib import Path

import pytest

from megalr.comparison.results import Results
from megalr.comparison.runs import Recipe
from tests import processes
from tests.unit.method_recipes import compare, method, starts

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("rate", "code"), [(7, 2), (8, -9)])
def test_a_run_that_fails_holds_no_other_up(write, launchers, capsys, rate, code):
    given = {"a": {**method(), "learning_rates": [0.01, rate, 0.04]}, "b": {**method(), "learning_rates": [0.02]}}
    path = write(methods=given)
    with pytest.raises(SystemExit) as ended:
        compare(path, launchers)
    first = ["0.01 0", f"{rate} 0", "0.04 0", "0.02 0", "0.02 1", "0.02 2"]  # "a" is not repeated
    assert starts(launchers) == first
    log = next((path.parent / "out put" / "runs").glob("*.log"))
    lines = str(ended.value.code).strip().splitlines()  # Python prints it and exits with 1
    assert lines[1:] == [f"  a, learning rate {rate}, seed 0: {log}"]
    printed = capsys.readouterr().out
    assert f"[2/8] error: a, learning rate {rate}, seed 0 failed with exit code {code}; its last lines" in printed
    assert ("  something is broken\n" in printed) == (rate == 7)
    assert "a: a run of its grid failed; not repeated" in printed
    assert "[6/6] b" in printed
    table = (path.parent / "out put" / "table.md").read_text()
    assert f"| a | - | - | 0.01: 110.00; {rate}: -; 0.04: 120.00 |" in table
    assert "| b | 148.00 (" in table
    assert "Incomplete" in table
    with pytest.raises(SystemExit):
        compare(path, launchers)
    assert starts(launchers) == [*first, f"{rate} 0"]
    assert len(Results(path.parent / "out put" / "results.jsonl").rows()) == 5


def test_checkpoints_on_the_way_are_no_part_of_the_key(write, launchers):
    plain, saving = (Recipe(write(save_every=n), launchers / "models") for n in (None, 2))
    one, other = (recipe.run(recipe.methods[0], 0.01, 0) for recipe in (plain, saving))
    assert one.key == other.key
    assert [run.flags[run.flags.index("--save-every") + 1] for run in (one, other)] == ["3", "2"]


def test_a_run_with_a_checkpoint_is_continued_and_no_other(write, launchers, capsys):
    path = write(methods={"a": {**method(), "learning_rates": [0.01, 7]}}, seeds=[0])
    recipe = Recipe(path, launchers / "models")
    runs = path.parent / "out put" / "runs"
    for run in recipe.grid(recipe.methods[0]):
        (runs / run.folder / "checkpoints").mkdir(parents=True)
        (runs / run.folder / "checkpoints" / "latest").write_text("step2")
        (runs / run.folder / "summary.json").write_text("{}")  # of its end, which was not noted
    (runs / run.folder / "checkpoints" / "latest").unlink()  # killed before it was whole
    with pytest.raises(SystemExit):
        compare(path, launchers)
    assert starts(launchers) == ["0.01 0 resumed", "7 0"]
    (row,) = Results(path.parent / "out put" / "results.jsonl").rows().values()
    assert row["resumed"] is True
    assert "to train it from its start, delete" not in capsys.readouterr().out
    (runs / run.folder / "checkpoints" / "latest").write_text("step2")
    with pytest.raises(SystemExit):
        compare(path, launchers)
    assert starts(launchers)[2:] == ["7 0 resumed"]
    assert f"to train it from its start, delete {runs / run.folder}\n" in capsys.readouterr().out


def test_the_text_is_tokenised_before_runs_of_several_processes(write, launchers, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MEGALR_CACHE", str(tmp_path / "cache"))
    path = write(text={"train": ["words.txt"], "max_eval_tokens": 100})
    (path.parent / "words.txt").write_text("some words. " * 500)
    found = []

    def instead(*_, **__):
        found.append(len([*tmp_path.glob("cache/tokens/*/meta.json")]))
        return iter(())

    monkeypatch.setattr("megalr.comparison.methods.run_processes", instead)
    compare(path, launchers)
    assert set(found) == {0}
    found.clear()
    compare(path, launchers, "--processes", "2")
    assert set(found) == {1}
    assert "preparing the text\ntraining text: " in capsys.readouterr().out


@pytest.mark.slow
def test_a_killed_benchmark_goes_on_inside_a_run_to_the_same_numbers(write, launchers, tmp_path, monkeypatch):
    monkeypatch.setenv("MEGALR_CACHE", str(tmp_path / "cache"))
    for name in ("pretrain.py", "benchmark.py"):
        shutil.copy(ROOT / "launchers" / name, launchers)
    words = write().parent / "words.txt"
    words.write_text(" ".join(f"word {number * 7919 % 1009}" for number in range(20_000)))
    given = {"a": {**method(type="Muon"), "learning_rates": [0.01]}}
    settings = {"methods": given, "seeds": [0], "steps": 200, "text": {"train": ["words.txt"], "max_eval_tokens": 4000}}
    path = write(**settings, save_every=20)
    killed, whole = path.parent / "killed", path.parent / "whole"
    command = [sys.executable, launchers / "benchmark.py", "methods", "--recipe", path]
    with processes.started([*command, "--output", killed]) as benchmark:
        benchmark.wait_for(lambda: [*killed.glob("runs/*/checkpoints/latest")], "a checkpoint of its run")
        benchmark.send_signal(signal.SIGKILL)
        benchmark.wait()
    assert not (killed / "results.jsonl").exists()
    again = processes.run([*command, "--output", killed], limit=5 * processes.LIMIT)
    assert "a, learning rate 0.01, seed 0: goes on from its checkpoint" in again.stdout
    write(**settings)
    processes.run([*command, "--output", whole], limit=5 * processes.LIMIT)
    rows = [json.loads((folder / "results.jsonl").read_text()) for folder in (killed, whole)]
    assert [row["resumed"] for row in rows] == [True, False]
    for key in ("key", "perplexity", "test_perplexity", "curve"):
        assert rows[0][key] == rows[1][key]
