"""The loss curve of a run: read from ``metrics.jsonl``, drawn as a PNG."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from megalr.train.metrics import read_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Floats = NDArray[np.float64]

LOSS_COLOR, EVALUATION_COLOR, TEXT_COLOR = "#2f6f9f", "#c8502d", "#444444"
EVENT_COLORS = {"refactorization": "#7a5aa6", "momentum_reset": "#4f9a67"}
# The dashes of one kind fill the gaps of the other's where both fall on one step.
EVENT_STYLES = {"refactorization": (0, (5, 5)), "momentum_reset": (5, (5, 5))}
OTHER_EVENT_COLOR = "#999999"
MAX_FULL_HEIGHT_MARKS = 40  # more of one kind would hide the curves: they become ticks at the bottom
TICK_HEIGHT = 0.04  # of the axes' height
MIN_POINTS_TO_SMOOTH = 10
MIN_TICKS, MAX_TICKS = 4, 18
A_THOUSAND, A_MILLION = 999.5, 1e6  # from which numbers are shown without decimals, and with exponents
MAX_EXPONENT = 700.0  # the largest loss whose perplexity is a float


def plot_losses(metrics_jsonl_path: str | Path, png_path: str | Path, title: str = "") -> None:
    """Draw a run's ``metrics.jsonl`` as a PNG: loss against tokens, and the same heights as perplexity.

    The training loss is drawn raw (light) and smoothed, the held-out loss as points, refactorizations and
    momentum resets as light vertical marks. A file without rows gives a picture that says so.

    Args:
        metrics_jsonl_path: see :func:`read_history`.
        png_path: where to write.
        title: shown above the curves.
    """
    # Not pyplot: it keeps global state and picks a backend by the display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    history = read_history(metrics_jsonl_path)
    figure = Figure(figsize=(9, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    shown = title.encode(errors="replace").decode()  # a folder's name may be no text, and is no formula
    axes.set_title(shown, color=TEXT_COLOR, fontsize=12, loc="left", pad=10, parse_math=False)
    if len(history.tokens) or len(history.eval_tokens) or len(history.sample_tokens):
        _set_limits(axes, history)
        _draw_losses(axes, history)
        _draw_events(axes, history)
        _label_axes(axes)
    else:
        axes.set_axis_off()
        figure.text(0.5, 0.5, "no measurements yet", ha="center", va="center", color=TEXT_COLOR)
    figure.savefig(png_path)


@dataclass(frozen=True)
class History:
    """The curves of one run, in the order of its steps; losses that are not finite are left out.

    Attributes:
        tokens, losses: training, (updates,) float64.
        eval_tokens, eval_losses: the whole held-out text, (evaluations,) float64.
        sample_tokens, sample_losses: a sample of it, (evaluations,) float64.
        events: for each kind of event, the tokens at which it happened.
    """

    tokens: Floats
    losses: Floats
    eval_tokens: Floats
    eval_losses: Floats
    sample_tokens: Floats
    sample_losses: Floats
    events: dict[str, list[int]]


def read_history(metrics_jsonl_path: str | Path) -> History:
    """Read ``metrics.jsonl``, in the order in which it was written.

    Rows with "loss" are training ("step", "tokens", "loss", perhaps "events", a list of names), rows with "eval_loss"
    are evaluations ("step", "tokens", "eval_loss", and "eval_is_sample" where they read a sample). Where the steps go
    back, a resumed run did them again: what the earlier one wrote of that step and later ones is dropped. A line cut
    off by a kill is ignored.
    """
    training: dict[int, dict[str, Any]] = {}
    evaluation: dict[int, dict[str, Any]] = {}
    samples: dict[int, dict[str, Any]] = {}
    last = -1
    for row in read_rows(Path(metrics_jsonl_path)):
        if row.get("tokens") is None:
            continue
        step = row["step"]
        if "loss" in row:
            if step <= last:
                training = {s: r for s, r in training.items() if s < step}
                evaluation = {s: r for s, r in evaluation.items() if s < step}
                samples = {s: r for s, r in samples.items() if s < step}
            training[step] = row
            last = step
        if "eval_loss" in row:
            (samples if row.get("eval_is_sample") else evaluation)[step] = row
    events: dict[str, list[int]] = {}
    for row in training.values():
        for name in row.get("events") or ():
            events.setdefault(name, []).append(row["tokens"])
    return History(*_curve(training, "loss"), *_curve(evaluation, "eval_loss"), *_curve(samples, "eval_loss"), events)


def _curve(rows: dict[int, dict[str, Any]], key: str) -> tuple[Floats, Floats]:
    points = [(rows[step]["tokens"], rows[step][key]) for step in sorted(rows) if rows[step][key] is not None]
    tokens, losses = np.array(points, dtype=np.float64).reshape(-1, 2).T
    finite = np.isfinite(losses)
    return tokens[finite], losses[finite]


def _set_limits(axes: Axes, history: History) -> None:
    losses = np.concatenate([history.losses, history.eval_losses, history.sample_losses])
    span = max(losses.max() - losses.min(), 0.1)
    axes.set_ylim(losses.min() - 0.08 * span, losses.max() + 0.05 * span)
    most = max(np.concatenate([history.tokens, history.eval_tokens, history.sample_tokens]).max(), 1.0)
    axes.set_xlim(-0.02 * most, 1.02 * most)


def _draw_events(axes: Axes, history: History) -> None:
    for name, tokens in history.events.items():
        count = len(tokens)
        axes.vlines(
            tokens,
            0,
            1 if count <= MAX_FULL_HEIGHT_MARKS else TICK_HEIGHT,
            transform=axes.get_xaxis_transform(),
            colors=EVENT_COLORS.get(name, OTHER_EVENT_COLOR),
            linewidth=1,
            alpha=0.6,
            zorder=1,
            linestyles=EVENT_STYLES.get(name, "-"),
            label=f"{name.replace('_', ' ')} ({count})",
        )


def _draw_losses(axes: Axes, history: History) -> None:
    if len(history.losses):
        few = len(history.losses) < MIN_POINTS_TO_SMOOTH
        axes.plot(
            history.tokens,
            history.losses,
            color=LOSS_COLOR,
            alpha=1 if few else 0.25,
            linewidth=1,
            marker="." if few else "",
            label="training loss" if few else "training loss, each step",
        )
        if not few:
            label = "training loss, smoothed"
            axes.plot(history.tokens, _smooth(history.losses), color=LOSS_COLOR, linewidth=1.8, label=label)
    if len(history.sample_losses):
        axes.plot(
            history.sample_tokens,
            history.sample_losses,
            color=EVALUATION_COLOR,
            marker=".",
            markersize=4,
            linewidth=1,
            label="held-out loss, of a sample",
        )
    if len(history.eval_losses):
        axes.plot(
            history.eval_tokens,
            history.eval_losses,
            color=EVALUATION_COLOR,
            marker="o",
            markersize=5,
            linewidth=0 if len(history.sample_losses) else 1,
            label="held-out loss",
        )
        axes.annotate(
            f"perplexity {_perplexity(history.eval_losses[-1])}",
            (history.eval_tokens[-1], history.eval_losses[-1]),
            xytext=(0, 12),
            textcoords="offset points",
            ha="right",
            color=EVALUATION_COLOR,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5},
        )


def _label_axes(axes: Axes) -> None:
    axes.set_xlabel("training tokens", color=TEXT_COLOR)
    axes.set_ylabel("loss (nats per token)", color=TEXT_COLOR)
    axes.xaxis.set_major_formatter(lambda tokens, _: _short(tokens))
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    right = axes.twinx()
    right.set_ylim(axes.get_ylim())
    perplexities = _perplexity_ticks(*axes.get_ylim())
    right.set_yticks([math.log(p) for p in perplexities], [_perplexity(math.log(p)) for p in perplexities])
    right.set_ylabel("perplexity", color=TEXT_COLOR)
    for side in (axes, right):
        side.tick_params(colors=TEXT_COLOR)
        side.spines[["top"]].set_visible(False)
        side.spines[["left", "right", "bottom"]].set_color("#bbbbbb")
    axes.legend(loc="upper right", framealpha=0.9, edgecolor="none", labelcolor=TEXT_COLOR, fontsize=9)


def _smooth(losses: Floats) -> Floats:
    """A moving average over about a thirtieth of the run, centred also at the steep start."""
    half = max(3, len(losses) // 60)
    index = np.arange(len(losses))
    first = np.maximum(index - half, 0)
    last = np.minimum(index + np.minimum(half, index), len(losses) - 1)
    sums = np.concatenate([[0.0], np.cumsum(losses)])
    return np.asarray((sums[last + 1] - sums[first]) / (last + 1 - first))


def _perplexity_ticks(low: float, high: float) -> list[float]:
    """Perplexities with logarithms in [low, high]: 1, 2, 5, 10, ..., or even steps where those are few."""
    from matplotlib.ticker import MaxNLocator

    high = min(high, MAX_EXPONENT)
    decades = range(math.floor(low / math.log(10)), math.ceil(high / math.log(10)) + 1)
    digits = (1, 2, 5) if 3 * len(decades) <= MAX_TICKS else (1,)
    stride = math.ceil(len(decades) / MAX_TICKS)
    ticks = [digit * 10.0**decade for decade in decades[::stride] for digit in digits]
    inside = [tick for tick in ticks if low <= math.log(tick) <= high]
    if len(inside) < MIN_TICKS:
        even = MaxNLocator(MIN_TICKS + 2).tick_values(math.exp(low), math.exp(high))
        inside = [float(tick) for tick in even if tick > 0 and low <= math.log(tick) <= high]
    return inside


def _perplexity(loss: float) -> str:
    perplexity = math.exp(min(loss, MAX_EXPONENT))
    return f"{perplexity:,.0f}" if A_THOUSAND <= perplexity < A_MILLION else f"{perplexity:.4g}"


def _short(number: float) -> str:
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= unit:
            return f"{number / unit:.4g}{name}"
    return f"{number:g}"
