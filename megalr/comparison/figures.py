"""The figures of a comparison: training losses, and perplexity against memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megalr.comparison.results import score
from megalr.comparison.table import Row
from megalr.train.loss_curve import TEXT_COLOR

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHOWN_FROM = 0.1  # of the tokens: earlier losses would squeeze the differences into the lower edge
DPI = 150


def draw_figures(rows: Sequence[Row], folder: Path) -> None:
    """Write ``curves.png`` and ``memory.png``."""
    _figure(folder / "curves.png", rows, _draw_curves)
    _figure(folder / "memory.png", rows, _draw_memory)


def _figure(path: Path, rows: Sequence[Row], draw: Callable[[Axes, Row, Any], None]) -> None:
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
