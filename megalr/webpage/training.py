"""Sections on the training itself: loss and events, perplexity, learning rates, gradients, skipped updates."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megalr.webpage import chart, lanes
from megalr.webpage.axes import LARGEST, Axis, perplexity, span
from megalr.webpage.chart import COLORS, Chart, Level, Mark
from megalr.webpage.curves import FEWEST_TO_SMOOTH, Curve, averaged, dash, smoothed, thinned
from megalr.webpage.foreign import escaped, finite
from megalr.webpage.history import History
from megalr.webpage.run import Run
from megalr.webpage.tables import card, table

Floats = NDArray[np.float64]

BLUE, RED, GREEN, PURPLE, GOLD, PINK, TEAL, GRAY = range(COLORS)
EVENT_COLORS = {"refactorization": PURPLE, "momentum_reset": GREEN, "refresh": GOLD, "skipped": PINK}
FEWEST_FOR_LANES_ALONE = 24  # events of a kind; more would hide the curves
MOST_SKIPPED = 60  # rows of the table
MOST_RATES = 12  # lines


def tokens_axis(histories: Sequence[History]) -> Axis:
    """The x axis of all charts over training tokens."""
    found = [each for history in histories for each in (history.training["tokens"], history.held_out("tokens"))]
    tokens = np.concatenate(found) if found else np.zeros(0)
    high = float(tokens.max()) if len(tokens) else 1.0
    low = min(float(tokens.min()), 0.0) if len(tokens) else 0.0
    low, high = max(low, -LARGEST), min(high, LARGEST)
    high = high if high > low else low + max(1.0, abs(low))
    room = 0.01 * (high - low)
    return Axis(low - room, high + room)


def loss_section(run: Run, x: Axis) -> str:
    """The loss while training and of the held-out text, and below it the events."""
    history = run.history
    tokens, losses = history.training["tokens"], history.training["loss"]
    few = len(losses) < FEWEST_TO_SMOOTH
    curves = [
        Curve(
            "training loss" if few else "training loss, each update",
            *thinned(tokens, losses),
            BLUE,
            "line" if few else "faint",
        )
    ]
    smooth = smoothed(losses)
    if not few:
        curves.append(Curve("training loss, smoothed", *thinned(tokens, smooth, 800), BLUE))
    curves += _held_out(history, "eval_loss", "held-out loss")
    curves = [curve for curve in curves if not curve.is_empty]
    y = _loss_axis(losses, smooth, history.held_out("eval_loss"))
    marks = event_marks(history)
    above = int((losses[np.isfinite(losses)] > y.high).sum())
    notes = [f"{above:,} losses lie above the chart." if above else ""]
    if not curves:
        notes.append("No loss has been measured yet." if not history.wrong else "")
    return chart.drawn(
        Chart(
            "loss",
            "Loss",
            x,
            y,
            curves,
            y_label="nats per token",
            note=" ".join(filter(None, notes)),
            marks=[mark for mark in marks if len(mark.x) <= FEWEST_FOR_LANES_ALONE],
            losses=True,
            tall=True,
            below=f'<div class="lanes">{lanes.drawn(x, marks)}</div>' if marks else "",
        )
    )


def event_marks(history: History) -> list[Mark]:
    """Every kind of event, and losses that are not finite."""
    tokens, losses = history.training["tokens"], history.training["loss"]
    others = iter([GOLD, TEAL, GRAY, RED, BLUE])
    marks = [
        Mark(
            "skipped update" if name == "skipped" else name.replace("_", " "),
            tokens[rows],
            EVENT_COLORS[name] if name in EVENT_COLORS else next(others, GRAY),
        )
        for name, rows in history.events.items()
    ]
    broken = np.isinf(losses)
    if broken.any():
        marks.append(Mark("infinite loss", tokens[broken], RED))
    return marks


def perplexity_section(run: Run, x: Axis) -> str:
    """The held-out perplexity on a logarithmic axis, beside the untrained and the unigram model; empty without any."""
    curves = _held_out(run.history, "eval_perplexity", "held-out perplexity")
    if not curves:
        return ""
    unigram = finite(run.summary.get("perplexity_unigram"))
    levels = [Level(f"unigram model: {perplexity(unigram)}", unigram)] if unigram is not None and unigram > 0 else []
    y = span([*(curve.y for curve in curves), np.array([level.y for level in levels])], log=True, form="perplexity")
    last = run.history.held_out("eval_perplexity")
    last = last[np.isfinite(last)]
    note = (f"The last value is {perplexity(float(last[-1]))}. " if len(last) else "") + "The axis is logarithmic."
    return chart.drawn(Chart("perplexity", "Held-out perplexity", x, y, curves, levels=levels, note=note))


def rates_section(run: Run, x: Axis) -> str:
    """The learning rate of each group of parameters; old runs have one rate. Empty without any."""
    training = run.history.training
    tokens = training["tokens"]
    rates = {name: training[f"learning_rates.{name}"] for name in training.names("learning_rates.")}
    if not rates:
        rates = {"learning rate": training["lr"]}
    alike: list[tuple[list[str], Floats]] = []
    for name, values in rates.items():
        if not np.isfinite(values).any():
            continue
        same = next((names for names, others in alike if np.array_equal(values, others, equal_nan=True)), None)
        if same is None:
            alike.append(([name], values))
        else:
            same.append(name)
    curves = [
        Curve(", ".join(names), *thinned(tokens, values, 600), index % COLORS, "line", dash(index))
        for index, (names, values) in enumerate(alike[:MOST_RATES])
    ]
    if not curves:
        return ""
    notes = []
    if any(len(names) > 1 for names, _ in alike):
        notes.append("Groups with the same learning rate share a line.")
    if len(alike) > MOST_RATES:
        notes.append(f"{len(alike) - MOST_RATES} more groups are left out.")
    axis = span([curve.y for curve in curves], zero=True)
    title = "Learning rates" if len(alike) > 1 else "Learning rate"
    return chart.drawn(Chart("rates", title, x, axis, curves, note=" ".join(notes)))


def gradient_section(run: Run, x: Axis) -> str:
    """The gradient norm, each update's and smoothed; empty without any."""
    tokens, norms = run.history.training["tokens"], run.history.training["grad_norm"]
    norms = np.where(norms > 0, norms, np.nan)
    curves = [
        Curve("each update", *thinned(tokens, norms), TEAL, "faint"),
        Curve("smoothed", *thinned(tokens, smoothed(norms), 600), TEAL),
    ]
    curves = [curve for curve in curves if not curve.is_empty]
    if not curves:
        return ""
    clipping = finite(run.section("deepspeed").get("gradient_clipping"))
    y = span([curve.y for curve in curves], log=True)
    levels = [Level(f"clipped to {clipping:g}", clipping)] if clipping and y.low < clipping < y.high else []
    note = "Before clipping. The axis is logarithmic."
    return chart.drawn(Chart("gradients", "Gradient norm", x, y, curves, levels=levels, note=note))


def exchange_section(run: Run, x: Axis) -> str:
    """Bytes that ranks send one another for whole matrices; empty where they sent nothing."""
    tokens, sent = run.history.training["tokens"], run.history.training["exchange_bytes"]
    if not (np.nan_to_num(sent) > 0).any():
        return ""
    curve = Curve("bytes per update", *thinned(tokens, sent), GOLD)
    y = span([curve.y], form="bytes", zero=True)
    note = "All ranks together, for updates that need whole matrices."
    return chart.drawn(Chart("exchange", "Exchange of matrices per update", x, y, [curve], note=note))


def skipped_section(run: Run) -> str:
    """A table of skipped updates and their reasons; empty if there are none."""
    history = run.history
    rows = history.events.get("skipped", [])
    if not rows:
        return ""
    steps, tokens = history.training["step"], history.training["tokens"]
    shown = rows[:MOST_SKIPPED]
    lines = [
        (f"{steps[row]:,.0f}", f"{tokens[row]:,.0f}", escaped(history.reasons.get(row, "no reason was recorded")))
        for row in shown
    ]
    note = f"The first {len(shown):,} of {len(rows):,}." if len(rows) > len(shown) else ""
    return card("skipped", "Skipped updates", table(("step", "tokens", "reason"), lines, text=(2,)), note)


def mean_curve(name: str, tokens: Floats, values: Floats, color: int, dashed: int = 0) -> Curve:
    """A noisy measurement, averaged over stretches of the run."""
    return Curve(name, *averaged(tokens, values), color, "line", dashed)


def _held_out(history: History, name: str, words: str) -> list[Curve]:
    """A field of the evaluations: of samples as a line, beside which those of the whole text are points."""
    curves = []
    if len(history.samples):
        points = thinned(history.samples["tokens"], history.samples[name], 400)
        curves.append(Curve(f"{words}, of a sample", *points, GOLD, "dots"))
    points = thinned(history.evaluations["tokens"], history.evaluations[name], 400)
    curves.append(Curve(words, *points, RED, "points" if len(history.samples) else "dots"))
    return [curve for curve in curves if not curve.is_empty]


def _loss_axis(losses: Floats, smooth: Floats, held_out: Floats) -> Axis:
    """An axis for all losses, but for spikes far above the others."""
    found = losses[np.isfinite(losses)]
    known = [held_out[np.isfinite(held_out)]]
    if len(found):
        usual = max(float(np.quantile(found, 0.98)), float(np.median(found[:5])))
        top = usual + 0.5 * (usual - float(found.min()))
        known += [np.minimum(found, top), np.minimum(smooth[np.isfinite(smooth)], top)]
    axis = span(known)
    return axis if math.isfinite(axis.high - axis.low) else Axis(0.0, 1.0)
