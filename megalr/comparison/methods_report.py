"""What comes out of a comparison of methods: a table in Markdown and two figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megalr.comparison.results import best_run, score, test_score
from megalr.comparison.runs import Recipe, Run
from megalr.layers import parametrize
from megalr.layout.planned import planned_layout
from megalr.markdown import table
from megalr.memory.formulas import (
    ParameterRecord,
    buffer_bytes,
    deepspeed_bytes,
    frozen_shapes,
    merged_shapes,
    paper_bytes,
)
from megalr.optim.matrices import kept_bytes, papers_floats
from megalr.train.models import empty_model
from megalr.train.report import TEXT_COLOR
from megalr.units import human_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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
SHOWN_FROM = 0.1  # of the tokens: losses before would squeeze what differs into the lower edge
DPI = 150


@dataclass(frozen=True)
class Memory:
    """What a method holds, by formula.

    Attributes:
        trained: parameters.
        papers: bytes as the papers count them, see :func:`megalr.memory.formulas.paper_bytes`.
        deepspeed: bytes of the process that holds the most, see :func:`megalr.memory.formulas.deepspeed_bytes`.
    """

    trained: int
    papers: int
    deepspeed: int


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
    memory: Memory
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


def write_report(recipe: Recipe, results: Mapping[str, Mapping[str, Any]], folder: Path) -> str:
    """Write ``table.md``, ``curves.png`` and ``memory.png``.

    Args:
        recipe: decides which results belong here.
        results: rows of ``results.jsonl`` by key.
        folder: where to write.

    Returns:
        The table and a few lines about it.
    """
    rows = [_row(recipe, method_index, results) for method_index in range(len(recipe.methods))]
    text = report(recipe, rows)
    (folder / "table.md").write_text(text + "\n", encoding="utf-8")
    _figure(folder / "curves.png", rows, _draw_curves)
    _figure(folder / "memory.png", rows, _draw_memory)
    return text


def report(recipe: Recipe, rows: Sequence[Row]) -> str:
    """The table in Markdown, with what one has to know to read it."""
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
        table(columns, [_cells(row)[: len(columns)] for row in rows]),
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


def method_memory(one: Run, recipe: Recipe) -> Memory:
    """Parameters and bytes of a run's method, by the planner's formulas."""
    config = one.megalr
    model = parametrize(empty_model(recipe.model), config.parametrization)
    groups = one.groups(recipe.model)
    treated = [index for index, group in enumerate(groups) if group.rule is not None]
    state: dict[str, int] = {}
    for rule, parameters in ((groups[index].rule, groups[index].parameters) for index in treated):
        assert rule is not None
        resting = rule.resting(list(parameters), 0, config.seed)
        for name, parameter in parameters.items():
            *stack, m, n = (1, *parameter.shape)  # a vector is a row
            count = 0 if name in resting else math.prod(stack)
            state[name] = count * papers_floats(rule, (m, n))

    def own_state(record: ParameterRecord) -> int | None:
        return state.get(record.name)

    shapes = [{name: tuple(parameter.shape) for name, parameter in group.parameters.items()} for group in groups]
    stage = (one.resolved.get("zero_optimization") or {}).get("stage", 0)
    layout = planned_layout(shapes, stage=stage, world_size=recipe.world_size)
    rules = {name: group.rule for group in groups if group.rule is not None for name in group.parameters}
    held = max(
        deepspeed_bytes(
            [list(group.values()) for group in shapes],
            stage=stage,
            world_size=recipe.world_size,
            rank=rank,
            dtype=torch.bfloat16 if (one.resolved.get("bf16") or {}).get("enabled") else torch.float32,
            treated=treated,
            treated_bytes=kept,
            frozen=frozen_shapes(model),
            buffers=buffer_bytes(model),
            merged=merged_shapes(model, config.parametrization),
        ).total
        for rank, kept in enumerate(kept_bytes(rules, layout.matrices(rules), seed=config.seed, replicated=stage == 0))
    )
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return Memory(trained, paper_bytes(model, treated_state=own_state), held)


def _row(recipe: Recipe, index: int, results: Mapping[str, Mapping[str, Any]]) -> Row:
    method = recipe.methods[index]
    grid = recipe.grid(method)
    best = best_run(grid, results)
    repeats = [] if best is None else recipe.repeats(method, best.lr)
    return Row(
        name=method.name,
        grid={run.lr: score(results[run.key]) if run.key in results else None for run in grid},
        rate=None if best is None else best.lr,
        results={run.seed: results[run.key] for run in repeats if run.key in results},
        seeds=len(repeats),
        memory=method_memory(grid[0], recipe),
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
        human_bytes(row.memory.deepspeed),
        f"{sum(speeds) / len(speeds):,.0f}" if speeds else "-",
        _as_published(row),
        "-" if row.published is None else f"{row.published:g}",
    ]


def _as_published(row: Row) -> str:
    """The mean over the runs that have been scored so, too; those of earlier versions have not."""
    scores = [result.get("test_perplexity_galore_compatible") for result in row.results.values()]
    found = [score for score in scores if score is not None]
    return f"{sum(found) / len(found):,.2f}" if found and all(map(math.isfinite, row.perplexities)) else "-"


def _figure(path: Path, rows: Sequence[Row], draw: Any) -> None:
    # Not pyplot: it keeps global state and picks a backend by the display.
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    palette = colormaps["tab20" if len(rows) > 10 else "tab10"]
    shown = 0
    for index, row in enumerate(rows):
        if any(map(math.isfinite, row.perplexities)):
            draw(axes, row, palette(index % palette.N))
            shown += 1
    if shown:
        axes.grid(color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(colors=TEXT_COLOR)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside right upper", edgecolor="none", labelcolor=TEXT_COLOR, fontsize=9)
    else:
        axes.set_axis_off()
        figure.text(0.5, 0.5, "no measurements yet", ha="center", va="center", color=TEXT_COLOR)
    figure.savefig(path)


def _draw_curves(axes: Axes, row: Row, color: Any) -> None:
    """The training loss, mean over the seeds that did not diverge."""
    curves = [result["curve"] for result in row.results.values() if math.isfinite(score(result))]
    length = min(map(len, curves))
    tokens = [curves[0][point][0] for point in range(length)]
    losses = [sum(curve[point][1] for curve in curves) / len(curves) for point in range(length)]
    first = next((point for point in range(length) if tokens[point] >= SHOWN_FROM * tokens[-1]), 0)
    axes.plot(tokens[first:], losses[first:], color=color, linewidth=1.4, label=f"{row.name}, {row.rate:g}")
    axes.set_xlabel("training tokens", color=TEXT_COLOR)
    axes.set_ylabel("training loss (nats per token)", color=TEXT_COLOR)


def _draw_memory(axes: Axes, row: Row, color: Any) -> None:
    """Perplexity, with the range over seeds, against the papers' memory."""
    found = [value for value in row.perplexities if math.isfinite(value)]
    mean = sum(found) / len(found)
    reach = [[mean - min(found)], [max(found) - mean]]
    axes.errorbar(row.memory.papers / 1e6, mean, yerr=reach, color=color, fmt="o", capsize=3, label=row.name)
    axes.set_xlabel("weights and optimizer state in bf16, as the papers count (MB)", color=TEXT_COLOR)
    axes.set_ylabel("test perplexity", color=TEXT_COLOR)
