"""The comparison of methods trains what is missing, also after runs have failed or the comparison was killed."""

import json
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from megalr.comparison.results import Results
from megalr.comparison.runs import Recipe
from megalr.comparison.table import COLUMNS, memory_of
from megalr.comparison.trainer import _write_private
from megalr.errors import UserError
from tests.processes import run, started
from tests.unit.comparison_recipes import compare, content, method, running, starts

ROOT = Path(__file__).parents[2]


def test_a_comparison_from_start_to_end(write, launchers, capsys):
    output = compare(write(), launchers, "--jobs", "2")
    assert sorted(starts(launchers)) == sorted(
        ["0.01 0", "0.02 0", "0.04 0", "0.02 1", "0.02 2", "0.01 0", "0.02 0", "9 0", "0.02 1", "0.02 2"]
    )
    rows = list(Results(output / "results.jsonl").rows().values())
    assert len(rows) == 10
    (diverged,) = (row for row in rows if row["perplexity"] is None)
    assert (diverged["lr"], diverged["reason"]) == (9, "diverged: the loss is nan at step 2")
    finished = next(row for row in rows if row["lr"] == 0.02 and row["method"] == "projected" and row["seed"] == 2)
    assert (finished["rank"], finished["perplexity"], finished["reason"]) == (4, 102, "finished")
    assert len(finished["last_losses"]) == 10
    assert len(finished["curve"]) <= 100
    assert finished["curve"][-1][0] == 8 * 250
    assert not list((output / "runs").iterdir())

    printed = capsys.readouterr().out
    assert "[10/10]" in printed
    assert "projected, learning rate 9, seed 0: perplexity inf" in printed
    table = (output / "table.md").read_text()
    assert table in printed + "\n"
    assert "| AdamW | 148.00 (146.00 to 150.00; 3 seeds) | 0.02 | 0.01: 110.00; 0.02: 100.00; 0.04: 120.00 |" in table
    assert "0.01: 110.00; 0.02: 100.00; 9: inf |" in table
    assert "Incomplete" not in table
    assert "edge" not in table
    assert all(f" {column} " in table for column in COLUMNS)
    for figure in ("curves.png", "memory.png"):
        assert (output / figure).stat().st_size > 10_000


def test_a_run_whose_text_has_changed_meanwhile_has_no_result(write, launchers, capsys):
    recipe = write(text={"train": ["words.txt"]}, methods={"a": method()}, seeds=[0])
    text = recipe.parent / "words.txt"
    text.write_text("one")
    launcher = launchers / "pretrain.py"
    works = launcher.read_text()
    launcher.write_text(f"{works}\npathlib.Path({str(text)!r}).write_text('two')\n")
    with pytest.raises(SystemExit, match="these runs failed"):
        compare(recipe, launchers)
    assert f"train (['{text}']) has changed since the comparison began" in capsys.readouterr().out
    assert not Results(recipe.parent / "out put" / "results.jsonl").rows()
    text.touch()  # no change
    launcher.write_text(works + f"\nos.utime({str(text)!r})\n")
    assert len(Results(compare(recipe, launchers) / "results.jsonl").rows()) == 1


def test_a_second_start_trains_only_what_is_missing(write, launchers, capsys):
    output = compare(write(), launchers)
    before = len(starts(launchers))
    results = output / "results.jsonl"
    assert compare(write(), launchers) == output
    assert len(starts(launchers)) == before
    lines = results.read_text().splitlines()
    results.write_text("\n".join([*lines[:-1], lines[-1][:50]]))  # as a kill leaves it
    compare(write(), launchers)
    assert len(starts(launchers)) == before + 1
    assert len(Results(results).rows()) == 10
    more = content()["methods"] | {"third": {"optimizer": {"type": "Muon"}, "learning_rates": [0.03]}}
    compare(write(methods=more), launchers)
    assert starts(launchers)[before + 1 :] == ["0.03 0", "0.03 1", "0.03 2"]
    assert "9 of 10 runs" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes",
    [
        {"perplexity": "low"},
        {"curve": [[1]]},
        {"curve": None},
        {"key": 1},
        {"test_perplexity": []},
        {"tokens_per_second": "x"},
    ],
)
def test_a_line_that_is_no_result_is_left_out(tmp_path, changes):
    results = Results(tmp_path / "results.jsonl")
    row = {"key": "a", "perplexity": 1.0, "test_perplexity": None, "curve": [[8, 5.0]], "tokens_per_second": None}
    results.append(row)
    results.append({**row, **({"key": "b"} | changes)})
    results.append({"key": "c"})
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write("[" * 100_000)
    assert results.rows() == {"a": row}


def test_a_runs_json_is_for_its_owner_alone(tmp_path):
    for _ in range(2):  # one that is there already may be read by others
        _write_private(tmp_path / "run.json", "{}")
        assert (tmp_path / "run.json").stat().st_mode & 0o777 == 0o600
        (tmp_path / "run.json").chmod(0o644)


def test_every_rate_diverged(write, launchers, capsys):
    output = compare(write(methods={"a": {**method(), "learning_rates": [9]}}), launchers)
    assert "| a | inf | 9 | 9: inf |" in (output / "table.md").read_text()
    assert starts(launchers) == ["9 0"]
    assert "every learning rate diverged" in capsys.readouterr().out


@pytest.mark.parametrize(("rate", "code"), [(7, 2), (8, -9)])
def test_a_failed_run_does_not_stop_the_others(write, launchers, capsys, rate, code):
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
    for one in recipe.grid(recipe.methods[0]):
        (runs / one.folder / "checkpoints").mkdir(parents=True)
        (runs / one.folder / "checkpoints" / "latest").write_text("step2")
        (runs / one.folder / "summary.json").write_text("{}")  # of its end, which was not noted
    (runs / one.folder / "checkpoints" / "latest").unlink()  # killed before it was whole
    with pytest.raises(SystemExit):
        compare(path, launchers)
    assert starts(launchers) == ["0.01 0 resumed", "7 0"]
    (row,) = Results(path.parent / "out put" / "results.jsonl").rows().values()
    assert row["resumed"] is True
    assert "to train it from its start, delete" not in capsys.readouterr().out
    (runs / one.folder / "checkpoints" / "latest").write_text("step2")
    with pytest.raises(SystemExit):
        compare(path, launchers)
    assert starts(launchers)[2:] == ["7 0 resumed"]
    assert f"to train it from its start, delete {runs / one.folder}\n" in capsys.readouterr().out


def test_the_text_is_tokenized_before_runs_of_several_processes(write, launchers, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MEGALR_CACHE", str(tmp_path / "cache"))
    path = write(text={"train": ["words.txt"], "max_eval_tokens": 100})
    (path.parent / "words.txt").write_text("some words. " * 500)
    found = []

    def instead(*_, **__):
        found.append(len([*tmp_path.glob("cache/tokens/*/meta.json")]))
        return iter(())

    monkeypatch.setattr("megalr.comparison.trainer.run_processes", instead)
    compare(path, launchers)
    assert set(found) == {0}
    found.clear()
    compare(path, launchers, "--processes", "2")
    assert set(found) == {1}
    assert "preparing the text\ntraining text: " in capsys.readouterr().out


@pytest.mark.slow
def test_a_killed_comparison_continues_inside_a_run_to_the_same_numbers(write, launchers, tmp_path, monkeypatch):
    monkeypatch.setenv("MEGALR_CACHE", str(tmp_path / "cache"))
    for name in ("pretrain.py", "compare.py"):
        shutil.copy(ROOT / "launchers" / name, launchers)
    words = write().parent / "words.txt"
    words.write_text(" ".join(f"word {number * 7919 % 1009}" for number in range(20_000)))
    given = {"a": {**method(type="Muon"), "learning_rates": [0.01]}}
    settings = {"methods": given, "seeds": [0], "steps": 200, "text": {"train": ["words.txt"], "max_eval_tokens": 4000}}
    path = write(**settings, save_every=20)
    killed, whole = path.parent / "killed", path.parent / "whole"
    command = [sys.executable, launchers / "compare.py", "--recipe", path]
    with started([*command, "--output", killed]) as process:
        process.wait_for(lambda: [*killed.glob("runs/*/checkpoints/latest")])
        process.send_signal(signal.SIGKILL)
    assert not (killed / "results.jsonl").exists()
    again = run([*command, "--output", killed])
    assert "a, learning rate 0.01, seed 0: goes on from its checkpoint" in again.stdout
    write(**settings)
    run([*command, "--output", whole])
    rows = [json.loads((folder / "results.jsonl").read_text()) for folder in (killed, whole)]
    assert [row["resumed"] for row in rows] == [True, False]
    for key in ("key", "perplexity", "test_perplexity", "curve"):
        assert rows[0][key] == rows[1][key]


def test_a_killed_comparison_takes_its_runs_with_it_and_keeps_others_out(write, launchers):
    slow = {"a": {**method(type="AdamW", params={"weight_decay": 600.0}), "learning_rates": [0.01]}}
    path = write(methods=slow, seeds=[0])
    shutil.copy(ROOT / "launchers" / "compare.py", launchers)
    command = [sys.executable, launchers / "compare.py", "--recipe", path, "--output", path.parent / "out"]
    with started(command, warm=True) as process:
        process.wait_for((launchers / "starts").exists)
        again = run(command, check=False, warm=True)
        assert again.code == 2
        assert re.search(rf"process \d+ on .*, started .*, writes into {path.parent / 'out'}: wait", again.stderr)
        process.send_signal(signal.SIGKILL)
        process.wait()
    end = time.monotonic() + 60
    while running("--output", str(path.parent / "out" / "runs")):
        assert time.monotonic() < end
        time.sleep(0.05)
    assert not (path.parent / "out" / "results.jsonl").exists()


def test_more_processes_than_gpus_are_refused(write, launchers, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(UserError, match="--jobs times --processes is 4, and there are 2 GPUs"):
        compare(write(), launchers, "--jobs", "2", "--processes", "2")


@pytest.mark.slow
def test_every_method_of_the_smoke_recipe_trains(launchers, tmp_path):
    shutil.copy(ROOT / "launchers" / "pretrain.py", launchers)
    path = ROOT / "launchers" / "recipes" / "paper_smoke.yaml"
    for model in (ROOT / "launchers" / "models").glob("*.json"):
        shutil.copy(model, launchers / "models")
    compare(path, launchers, "--jobs", "2", output=tmp_path / "out put")
    recipe = Recipe(path, launchers / "models")
    rows = Results(tmp_path / "out put" / "results.jsonl").rows()
    for each in recipe.methods:
        (one,) = recipe.grid(each)
        row = rows[one.key]
        assert row["reason"] == "finished"
        assert row["test_perplexity"] != row["perplexity"]
        assert row["perplexity"] < 2500  # an untrained model has 4,100 or more
        assert sum(row["bytes_per_rank"].values()) == memory_of(one, recipe).largest
    assert len({row["perplexity"] for row in rows.values()}) == len(recipe.methods)
