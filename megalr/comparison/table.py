"""The table of a comparison: the best rate of each method, its perplexities, its memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megalr.comparison.recipe import Method
from megalr.comparison.results import best_run, score, test_score
from megalr.comparison.runs import Recipe, Run
from megalr.formatting import human_bytes, markdown_table
from megalr.layers.replacement import parametrize
from megalr.memory.methods import MethodMemory, method_memory
from megalr.train.models import empty_model

COLUMNS = (
    "method",
    "test perplexity",
    "best rate",
    "the grid's perplexities",
    "trained parameters",
    "papers' memory",
    "DeepSpeed's memory",
    "tokens/s",
)
PUBLISHED = ("as published code counts", "published")  # where the recipe has figures to compare with


@dataclass(frozen=True)
class Row:
    """What is known of a method.

    Attributes:
        name: of the method.
        grid: perplexity by learning rate; None where it has not been trained yet.
        rate: the best one; None while the grid is incomplete.
        results: of the best rate's runs, by seed; those that are missing are left out.
        seeds: how many there should be.
        memory: by formula.
        published: the recipe's.
        own_ends: which of the embeddings and the head its own rule trains.
    """

    name: str
    grid: dict[float, float | None]
    rate: float | None
    results: dict[int, Mapping[str, Any]]
    seeds: int
    memory: MethodMemory
    published: float | None
    own_ends: tuple[str, ...] = ()

    @property
    def perplexities(self) -> list[float]:
        """Of the best rate's runs, on the test text."""
        return [test_score(result) for result in self.results.values()]

    @property
    def mean(self) -> float:
        """Of the perplexities; infinite where one is, NaN where there are none."""
        found = self.perplexities
        return sum(found) / len(found) if found else math.nan

    @property
    def at_the_edge(self) -> bool:
        """Whether the best of several rates is the smallest or the largest, so that a better one may lie beyond."""
        return len(self.grid) > 1 and self.rate in (min(self.grid), max(self.grid))


def rows_of(recipe: Recipe, results: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """A row for each method of a recipe.

    Args:
        recipe: decides which results belong here.
        results: rows of ``results.jsonl`` by key.
    """
    return [_row(recipe, method, results) for method in recipe.methods]


def markdown(recipe: Recipe, rows: Sequence[Row]) -> str:
    """The table in Markdown, with notes on how to read it."""
    settings = recipe.settings
    published = any(row.published is not None for row in rows)
    columns = (*COLUMNS, *PUBLISHED) if published else COLUMNS
    seeds = ", ".join(map(str, settings.seeds))
    processes = recipe.world_size
    where = "in one process" if processes == 1 else f"in the one of {processes} processes that has the most"
    lines = [
        f"{settings.model}, {settings.steps:,} steps of {settings.batch_size} sequences of {settings.sequence_length} "
        f"tokens. Perplexity on test text, the second half of what is held out: mean (and range) over seeds {seeds}, "
        f"unless fewer are named, at the learning rate that was best on the first half at seed {settings.grid_seed}. "
        "Memory: weights and optimizer state in bf16, as the papers count; and what DeepSpeed holds "
        f"{where}, gradients included.",
        "",
        markdown_table(columns, [_cells(row)[: len(columns)] for row in rows]),
    ]
    if published:
        lines += [
            "",
            "As published code counts: the mean test perplexity by GaLore's evaluation, which divides by one batch too "
            "many, and so is too low, the more the fewer batches the text has; to be compared with what is published.",
        ]
    if edge := [row.name for row in rows if row.at_the_edge]:
        lines += ["", f"\\* the best rate is at the edge of its grid, a better one may lie beyond: {', '.join(edge)}."]
    if own := [f"{row.name} ({' and '.join(row.own_ends)})" for row in rows if row.own_ends]:
        lines += [
            "",
            f"Trained by a method's own rule, at its rate, and not by AdamW as for all others: {', '.join(own)}.",
        ]
    missing = sum(value is None for row in rows for value in row.grid.values())
    missing += sum(row.seeds - len(row.results) for row in rows if row.rate is not None and math.isfinite(_best(row)))
    if missing or any(row.rate is None for row in rows):
        lines += ["", f"Incomplete: at least {missing} runs have no result yet."]
    return "\n".join(lines)


def memory_of(one: Run, recipe: Recipe) -> MethodMemory:
    """Parameters and bytes of a run's method, by formula."""
    config = one.megalr
    return method_memory(
        parametrize(empty_model(recipe.model), config.parametrization),
        one.groups(recipe.model),
        config.parametrization,
        stage=(one.resolved.get("zero_optimization") or {}).get("stage", 0),
        world_size=recipe.world_size,
        dtype=torch.bfloat16 if (one.resolved.get("bf16") or {}).get("enabled") else torch.float32,
        seed=config.seed,
    )


def _row(recipe: Recipe, method: Method, results: Mapping[str, Mapping[str, Any]]) -> Row:
    grid = recipe.grid(method)
    best = best_run(grid, results)
    repeats = [] if best is None else recipe.repeats(method, best.lr)
    return Row(
        name=method.name,
        grid={run.lr: score(results[run.key]) if run.key in results else None for run in grid},
        rate=None if best is None else best.lr,
        results={run.seed: results[run.key] for run in repeats if run.key in results},
        seeds=len(repeats),
        memory=memory_of(grid[0], recipe),
        published=method.published,
        own_ends=grid[0].own_ends,
    )


def _best(row: Row) -> float:
    return min((value for value in row.grid.values() if value is not None), default=math.nan)


def _cells(row: Row) -> list[str]:
    found = row.perplexities
    perplexity = "-"
    if found:
        perplexity = f"{row.mean:,.2f}"
        if len(found) > 1:
            perplexity += f" ({min(found):,.2f} to {max(found):,.2f}; {len(found)} seeds)"
        if len(found) < row.seeds and math.isfinite(_best(row)):
            perplexity += f", {len(found)} of {row.seeds} seeds"
    speeds = [speed for result in row.results.values() if (speed := result["tokens_per_second"])]
    grid = [f"{rate:g}: {'-' if value is None else f'{value:,.2f}'}" for rate, value in row.grid.items()]
    return [
        row.name,
        perplexity,
        "-" if row.rate is None else f"{row.rate:g}" + " \\*" * row.at_the_edge,
        "; ".join(grid),
        f"{row.memory.trained:,}",
        human_bytes(row.memory.papers),
        human_bytes(row.memory.largest),
        f"{sum(speeds) / len(speeds):,.0f}" if speeds else "-",
        _as_published(row),
        "-" if row.published is None else f"{row.published:g}",
    ]


def _as_published(row: Row) -> str:
    """The mean over the runs that have been scored so, too; those of earlier versions have not."""
    scores = [result.get("test_perplexity_galore_compatible") for result in row.results.values()]
    found = [score for score in scores if score is not None]
    return f"{sum(found) / len(found):,.2f}" if found and all(map(math.isfinite, row.perplexities)) else "-"
