"""What a comparison of methods reports: the best rates, perplexities, memory."""

import math
from pathlib import Path

import pytest

from megalr.comparison.results import Results, best_run
from megalr.comparison.runs import Recipe
from megalr.comparison.table import memory_of
from megalr.errors import UserError
from tests.unit.comparison_recipes import compare, content, method, starts

ROOT = Path(__file__).parents[2]

# Gigabytes as the papers count them: 2 bytes a weight and a moment; SLTrain with int32 indices.
PAPERS = {
    "full rank, AdamW": (0.348, 2.208),
    "low-rank, both": (0.257, 1.111),
    "SLTrain": (0.264, 1.202),
    "GaLore": (0.280, 1.389),
    "APOLLO-Mini": (0.247, 0.999),
    "SCALE": (0.149, 0.801),
}


@pytest.mark.parametrize(("size", "column"), [("60m", 0), pytest.param("350m", 1, marks=pytest.mark.slow)])
def test_the_papers_recipes_have_the_papers_memory(size, column):
    recipe = Recipe(ROOT / "launchers" / "recipes" / f"paper_{size}.yaml", ROOT / "launchers" / "models")
    methods = {method.name: method for method in recipe.methods}
    for name, expected in PAPERS.items():
        found = memory_of(recipe.grid(methods[name])[0], recipe).papers / 1e9
        assert found == pytest.approx(expected[column], abs=1.1e-3), name


def test_a_remainder_is_memory():
    recipe = Recipe(ROOT / "launchers" / "recipes" / "merge_rounding.yaml", ROOT / "launchers" / "models")
    nearest, stochastic, remainder = (memory_of(recipe.grid(m)[0], recipe).largest for m in recipe.methods)
    elements = 4 * (4 * 128 * 128 + 3 * 128 * 352)  # of all W0
    assert stochastic == nearest and remainder == nearest + 2 * elements


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
    dense, projected, galore = (memory_of(recipe.grid(m)[0], recipe) for m in recipe.methods)
    assert dense.papers == 6 * dense.trained == 6 * galore.trained
    assert dense.largest == 20 * dense.trained  # weights, gradients, masters, two moments
    assert projected.trained < dense.trained
    assert projected.papers < dense.papers
    assert galore.papers < dense.papers
    assert math.isclose(galore.largest - dense.largest, 2 * (galore.papers - dense.papers), rel_tol=1e-9)


def test_memory_of_several_processes_is_that_of_the_one_with_the_most(write, launchers):
    given = {"AdamW": method(), "GaLore": method(type="GaLoreAdamW", params={"rank": 4, "eps": 1e-8})}
    del (base := content()["base"])["optimizer"]["params"]["eps"]
    for one in base["optimizer"]["params"].values():
        one["eps"] = 1e-8

    def memory(stage, processes):
        path = write(methods=given, base={**base, "zero_optimization": {"stage": stage}}, batch_size=4)
        recipe = Recipe(path, launchers / "models", world_size=processes)
        return [memory_of(recipe.grid(m)[0], recipe) for m in recipe.methods]

    whole = memory(0, 1)[0].ranks  # everybody has everything
    assert memory(0, 4)[0].ranks == 4 * whole
    (dense, galore), (shared, owned) = memory(1, 1), memory(1, 4)
    assert shared.papers == dense.papers
    evenly = 8 * dense.trained + 12 * dense.trained / 4  # weights and gradients are whole
    assert evenly <= shared.largest <= evenly + 1000
    # A rule's state is with the matrices' owners, of whom one has more than its share.
    assert (galore.largest - dense.largest) / 4 < owned.largest - shared.largest < 0
    path = write(methods=given, base=base, batch_size=4)
    compare(path, launchers, "--processes", "4")
    table = (path.parent / "out put" / "table.md").read_text()
    assert "what DeepSpeed holds in the one of 4 processes that has the most" in table
