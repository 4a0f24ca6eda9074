"""The comparison of methods: its recipes, what makes two runs the same, what it resumes, chooses and reports."""

import argparse
import json
import math
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from megalr.comparison import methods
from megalr.comparison.methods_report import COLUMNS, method_memory
from megalr.comparison.results import Results, best_run
from megalr.comparison.runs import Recipe
from megalr.errors import UserError
from megalr.processes import run_processes
from tests.processes import run, started
from tests.unit.method_recipes import SHAPE, compare, content, method, starts

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stepps": 3}, 'did you mean "steps"'),
        ({"steps": None}, 'needs "steps"'),
        ({"steps": 0}, "steps is 0"),
        ({"base": None}, 'needs "base"'),
        ({"base": "none.json"}, "no DeepSpeed configuration"),
        ({"base": {"optimizer": {"params": {"lr": 1}}}}, "the base sets optimizer.params.lr"),
        ({"methods": {}}, 'needs "methods"'),
        ({"model": "gone"}, "no model called gone"),
        ({"seeds": [1, 1]}, "names one twice"),
        ({"text": {"trian": ["x"]}}, 'did you mean "train"'),
        ({"methods": {"a": {"optimizer": {"type": "AdamW"}}}}, "needs learning_rates"),
        ({"methods": {"a": {"learning_rates": [1]}}}, 'needs "optimizer"'),
        ({"methods": {"a": method(type="AdamV")}}, "method \"a\": optimizer.type is 'AdamV'"),
        ({"methods": {"a": method(type="AdamW", params={"embedding": {"lr": 1}})}}, "optimizer.params.embedding"),
        ({"methods": {"a": method(type="AdamW", params={"norm": {"lr": 1}})}}, "optimizer.params.norm"),
        ({"methods": {"a": method(type="Muon", params={"adamw": {"lr": 1}})}}, "optimizer.params.adamw"),
        ({"methods": {"a": method(type="AdamW", params={"lr": 1})}}, 'write "learning_rates" instead'),
        ({"methods": {"a": method(type="AdamW", params={"eps": 1e-6})}}, "which the base sets for all"),
        ({"methods": {"a": {**method(), "learning_rates": [1, 1]}}}, "twice"),
        ({"methods": {"a": {**method(), "learning_rates": ["x"]}}}, "positive numbers"),
        ({"methods": {"a": {**method(), "megalr": {"seed": 1}}}}, "recipe's seeds"),
        ({"methods": {"a": {**method(), "megalr": {"parametrization": {"type": "projected", "rank": 99}}}}}, "99"),
    ],
)
def test_mistakes_in_a_recipe(write, launchers, changes, words):
    with pytest.raises(UserError) as error:
        Recipe(write(**changes), launchers / "models")
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [("steps: [", "not valid YAML"), ("- 1", "must hold a mapping"), ("steps: 1\nsteps: 2", "comes twice")],
)
def test_what_is_no_recipe(write, launchers, text, words):
    with pytest.raises(UserError, match=words):
        Recipe(write(text), launchers / "models")
    with pytest.raises(UserError, match="no recipe at"):
        Recipe(write(text).parent / "none.yaml", launchers / "models")


def test_methods_that_would_train_norms_differently_are_refused(write, launchers):
    base = {"optimizer": {"params": {"embedding": {"lr": 1e-2}}}}  # so norms follow the method's rate
    with pytest.raises(UserError, match=r"write optimizer\.params\.norm\.lr in the base"):
        Recipe(write(base=base), launchers / "models")
    base["optimizer"]["params"]["norm"] = {"lr": 1e-2}
    both = {"a": method(), "b": method(type="GaLoreAdamW", params={"rank": 4})}  # whose eps is 1e-6 by default
    with pytest.raises(UserError, match=r"write optimizer\.params\.embedding\.eps in the base"):
        Recipe(write(base=base, methods=both), launchers / "models")


def test_numbers_without_a_dot_are_numbers(write, launchers):
    path = write()
    path.write_text(path.read_text().replace("0.04", "4e-2"))
    assert Recipe(path, launchers / "models").methods[0].rates == (0.01, 0.02, 0.04)


@pytest.mark.parametrize(
    ("name", "count", "ranks"),
    [
        ("projected", 11, {None, 16, 32}),
        ("merge_rounding", 3, {32}),
        ("paper_tiny", 19, {None, 32}),
        ("paper_tiny_long", 2, {32}),
        ("paper_smoke", 8, {None, 32}),
        ("paper_60m", 19, {None, 1, 128}),
        ("paper_130m", 19, {None, 1, 256}),
        ("paper_350m", 19, {None, 1, 256}),
        ("paper_1b", 19, {None, 1, 512}),
    ],
)
def test_the_shipped_recipes_are_valid(name, count, ranks):
    recipe = Recipe(ROOT / "launchers" / "recipes" / f"{name}.yaml", ROOT / "launchers" / "models")
    assert len(recipe.methods) == count
    assert {run.rank for m in recipe.methods for run in recipe.grid(m)} == ranks


# Gigabytes as the papers count them: 2 bytes a weight and a moment; SLTrain with int32 indices.
PAPERS = {
    "full rank, AdamW": (0.348, 2.208),
    "low-rank, both": (0.257, 1.111),
    "SLTrain": (0.264, 1.202),
    "GaLore": (0.280, 1.389),
    "APOLLO-Mini": (0.247, 0.999),
    "SCALE": (0.149, 0.801),
}


@pytest.mark.parametrize(("size", "column"), [("60m", 0), ("350m", 1)])
def test_the_papers_recipes_have_the_papers_memory(size, column):
    recipe = Recipe(ROOT / "launchers" / "recipes" / f"paper_{size}.yaml", ROOT / "launchers" / "models")
    methods = {method.name: method for method in recipe.methods}
    for name, expected in PAPERS.items():
        found = method_memory(recipe.grid(methods[name])[0], recipe).papers / 1e9
        assert found == pytest.approx(expected[column], abs=1.1e-3), name


def test_the_papers_recipes_leave_eps_to_the_rules():
    recipe = Recipe(ROOT / "launchers" / "recipes" / "paper_60m.yaml", ROOT / "launchers" / "models")
    methods = {method.name: method for method in recipe.methods}
    groups = {name: recipe.grid(methods[name])[0].groups(recipe.model) for name in ("GaLore", "full rank, AdamW")}
    eps = {name: {g.name: g.settings.eps for g in found} for name, found in groups.items()}
    assert eps["GaLore"] == {"matrices": 1e-6, "embedding": 1e-8, "norm": 1e-8}
    assert eps["full rank, AdamW"] == {"trunk": 1e-8, "embedding": 1e-8, "norm": 1e-8}


def test_a_remainder_is_memory():
    recipe = Recipe(ROOT / "launchers" / "recipes" / "merge_rounding.yaml", ROOT / "launchers" / "models")
    nearest, stochastic, remainder = (method_memory(recipe.grid(m)[0], recipe).deepspeed for m in recipe.methods)
    elements = 4 * (4 * 128 * 128 + 3 * 128 * 352)  # of all W0
    assert stochastic == nearest and remainder == nearest + 2 * elements


def test_every_shipped_recipe_is_tested():
    assert {path.stem for path in (ROOT / "launchers" / "recipes").glob("*.yaml")} == {
        "merge_rounding",
        "paper_130m",
        "paper_1b",
        "paper_350m",
        "paper_60m",
        "paper_smoke",
        "paper_tiny",
        "paper_tiny_long",
        "projected",
    }


def test_the_key_names_what_determines_a_run(write, launchers):
    def keys(**changes):
        recipe = Recipe(write(**changes), launchers / "models")
        return [run.key for m in recipe.methods for run in recipe.grid(m)]

    first = keys()
    assert len(set(first)) == len(first) == 6
    assert keys() == first
    assert keys(seeds=[0, 5]) == first
    renamed = dict(zip(("x", "y"), content()["methods"].values(), strict=True))
    assert keys(methods=renamed) == first
    for change in ({"steps": 4}, {"batch_size": 4}, {"sequence_length": 8}, {"grid_seed": 1}):
        assert not set(first) & set(keys(**change))
    base = {**content()["base"], "gradient_clipping": 2.0}
    assert not set(first) & set(keys(base=base))


def test_the_key_follows_the_text_and_the_shape_not_their_names(write, launchers):
    path = write(text={"train": ["words.txt"]})
    text = path.parent / "words.txt"

    def key():
        recipe = Recipe(path, launchers / "models")
        assert str(text) in recipe.run(recipe.methods[0], 1.0, 0).flags
        return recipe.run(recipe.methods[0], 1.0, 0).key

    text.write_text("one")
    first = key()
    text.write_text("two")
    assert key() != first
    text.write_text("one")
    assert key() == first
    (path.parent / "small.json").write_text(json.dumps({**SHAPE, "intermediate_size": 44}))
    assert key() != first


def test_another_text_from_the_command_line(write, launchers, tmp_path):
    recipe = write(text={"train": ["words.txt"], "validation": ["kept.txt"], "max_eval_tokens": 7})
    other = tmp_path / "other.txt"
    other.write_text("one")
    read = Recipe(recipe, launchers / "models", ([str(other)], ()))
    one = read.run(read.methods[0], 1.0, 0)
    assert one.flags[one.flags.index("--dataset") + 1] == str(other)
    assert "--eval-dataset" not in one.flags  # the recipe's would be of another text
    assert one.flags[one.flags.index("--max-eval-tokens") + 1] == "7"
    with pytest.raises(UserError, match="name the text to train on"):
        compare(recipe, launchers, "--eval-dataset", str(other))


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


def test_every_rate_diverged(write, launchers, capsys):
    output = compare(write(methods={"a": {**method(), "learning_rates": [9]}}), launchers)
    assert "| a | inf | 9 | 9: inf |" in (output / "table.md").read_text()
    assert starts(launchers) == ["9 0"]
    assert "every learning rate diverged" in capsys.readouterr().out


def test_a_method_may_have_seeds_and_a_published_figure_of_its_own(write, launchers):
    given = {"a": {**method(), "seeds": [0, 3], "published": 34.58}, "b": method()}
    output = compare(write(methods=given), launchers)
    assert starts(launchers) == ["0.01 0", "0.01 3", "0.01 1", "0.01 2"]  # their grids are the same run
    lines = (output / "table.md").read_text().splitlines()
    a, b = (next(line for line in lines if line.startswith(f"| {name} ")) for name in "ab")
    assert "2 seeds" in a and "| 157.00 (" in a and a.endswith("| 78.50 | 34.58 |")  # the launcher's figure is half
    assert "3 seeds" in b and b.endswith("| 79.00 | - |")
    assert "as published code counts" not in (compare(write(), launchers) / "table.md").read_text().lower()
    with pytest.raises(UserError, match="seeds names one twice"):
        Recipe(write(methods={"a": {**method(), "seeds": [1, 1]}}), launchers / "models")


def test_a_report_of_what_is_there_so_far(write, launchers, capsys):
    with pytest.raises(UserError, match="there is no folder"):
        compare(write(), launchers, "--report")
    recipe = Recipe(write(), launchers / "models")
    output = write().parent / "out put"
    output.mkdir()
    compare(write(), launchers, "--report")
    assert "Incomplete" in (output / "table.md").read_text()
    results = Results(output / "results.jsonl")
    for lr, perplexity in ((0.01, 50.0), (0.02, 60.0), (0.04, None)):
        key = recipe.run(recipe.methods[0], lr, 0).key
        scores = {"perplexity": perplexity, "test_perplexity": perplexity}
        results.append({"key": key, **scores, "tokens_per_second": 10.0, "curve": [[8, 5.0]]})
    compare(write(), launchers, "--report")
    table = (output / "table.md").read_text()
    assert "| AdamW | 50.00, 1 of 3 seeds | 0.01 \\* | 0.01: 50.00; 0.02: 60.00; 0.04: inf |" in table
    assert "a better one may lie beyond: AdamW." in table
    assert "Incomplete: at least 5 runs" in table
    assert not (launchers / "starts").exists()


def test_the_best_rate(write, launchers):
    recipe = Recipe(write(), launchers / "models")
    grid = recipe.grid(recipe.methods[0])

    def best(*perplexities):
        rows = {run.key: {"perplexity": value} for run, value in zip(grid, perplexities, strict=False)}
        found = best_run(grid, rows)
        return None if found is None else found.lr

    assert best(3.0, 2.0, 2.0) == 0.02
    assert best(None, None, 9.0) == 0.04
    assert best(None, None, None) == 0.01
    assert best(1.0, 2.0) is None


def test_memory_follows_from_the_formulas(write, launchers):
    given = content()["methods"] | {"galore": method(type="GaLoreAdamW", params={"rank": 4})}
    recipe = Recipe(write(methods=given), launchers / "models")
    dense, projected, galore = (method_memory(recipe.grid(m)[0], recipe) for m in recipe.methods)
    assert dense.papers == 6 * dense.trained == 6 * galore.trained
    assert dense.deepspeed == 20 * dense.trained  # weights, gradients, masters, two moments
    assert projected.trained < dense.trained
    assert projected.papers < dense.papers
    assert galore.papers < dense.papers
    assert math.isclose(galore.deepspeed - dense.deepspeed, 2 * (galore.papers - dense.papers), rel_tol=1e-9)


def test_memory_of_several_processes_is_that_of_the_one_with_the_most(write, launchers):
    given = {"AdamW": method(), "GaLore": method(type="GaLoreAdamW", params={"rank": 4, "eps": 1e-8})}
    del (base := content()["base"])["optimizer"]["params"]["eps"]
    for one in base["optimizer"]["params"].values():
        one["eps"] = 1e-8

    def memory(stage, processes):
        path = write(methods=given, base={**base, "zero_optimization": {"stage": stage}}, batch_size=4)
        recipe = Recipe(path, launchers / "models", world_size=processes)
        return [method_memory(recipe.grid(m)[0], recipe) for m in recipe.methods]

    assert memory(0, 4) == memory(0, 1)  # everybody has everything
    (dense, galore), (shared, owned) = memory(1, 1), memory(1, 4)
    assert shared.papers == dense.papers
    evenly = 8 * dense.trained + 12 * dense.trained / 4  # weights and gradients are whole
    assert evenly <= shared.deepspeed <= evenly + 1000
    # A rule's state is with the matrices' owners, of whom one has more than its share.
    assert (galore.deepspeed - dense.deepspeed) / 4 < owned.deepspeed - shared.deepspeed < 0
    path = write(methods=given, base=base, batch_size=4)
    compare(path, launchers, "--processes", "4")
    table = (path.parent / "out put" / "table.md").read_text()
    assert "what DeepSpeed holds in the one of 4 processes that has the most" in table


def test_a_killed_benchmark_takes_its_runs_with_it_and_keeps_others_out(write, launchers):
    slow = {"a": {**method(type="AdamW", params={"weight_decay": 600.0}), "learning_rates": [0.01]}}
    path = write(methods=slow, seeds=[0])
    shutil.copy(ROOT / "launchers" / "benchmark.py", launchers)
    command = [sys.executable, launchers / "benchmark.py", "methods", "--recipe", path, "--output", path.parent / "out"]
    with started(command) as benchmark:
        benchmark.wait_for((launchers / "starts").exists, "the start of its run")
        again = run(command, check=False)
        assert again.code == 2
        assert "another benchmark is writing" in again.stderr
        benchmark.send_signal(signal.SIGKILL)
        assert benchmark.wait().code == -signal.SIGKILL
    _wait_for(lambda: not _running("--output", str(path.parent / "out" / "runs")))
    assert not (path.parent / "out" / "results.jsonl").exists()


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
    assert not _running(str(program))


def test_more_processes_than_gpus_are_refused(write, launchers, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(UserError, match="--jobs times --processes is 4, and there are 2 GPUs"):
        compare(write(), launchers, "--jobs", "2", "--processes", "2")


def _wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def _running(*words):
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = file.read_bytes().decode(errors="replace")
        except OSError:
            continue
        found += [line] if all(word in line for word in words) else []
    return found


@pytest.mark.slow
def test_every_method_of_the_smoke_recipe_trains(launchers, tmp_path):
    shutil.copy(ROOT / "launchers" / "pretrain.py", launchers)
    path = ROOT / "launchers" / "recipes" / "paper_smoke.yaml"
    for model in (ROOT / "launchers" / "models").glob("*.json"):
        shutil.copy(model, launchers / "models")
    parser = argparse.ArgumentParser()
    methods.add_arguments(parser)
    arguments = ["--recipe", str(path), "--output", str(tmp_path / "out put"), "--jobs", "2"]
    methods.run(parser.parse_args(arguments), launchers / "models")
    recipe = Recipe(path, launchers / "models")
    rows = Results(tmp_path / "out put" / "results.jsonl").rows()
    for each in recipe.methods:
        (one,) = recipe.grid(each)
        row = rows[one.key]
        assert row["reason"] == "finished"
        assert row["test_perplexity"] != row["perplexity"]
        assert row["perplexity"] < 2500  # an untrained model has 4,100 or more
        assert sum(row["bytes_per_rank"].values()) == method_memory(one, recipe).deepspeed
    assert len({row["perplexity"] for row in rows.values()}) == len(recipe.methods)
