"""Several runs on one page: their curves on common axes, their results, and the settings in which they differ."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megalr.formatting import human_bytes
from megalr.webpage import bars, chart
from megalr.webpage.axes import Axis, perplexity, short, span
from megalr.webpage.chart import COLORS, Chart
from megalr.webpage.curves import Curve, dash, smoothed, thinned
from megalr.webpage.document import Section, method_of, state_of
from megalr.webpage.foreign import escaped, finite
from megalr.webpage.machine import held_bytes
from megalr.webpage.run import Run
from megalr.webpage.settings import comparable
from megalr.webpage.tables import card, table
from megalr.webpage.training import mean_curve, tokens_axis

MOST_RUNS = 24
MOST_DIFFERENCES = 80
LONGEST_VALUE = 80
SAME_OF_ALL = (
    "started",
    "lives",
    "command",
    "arguments.output",
    "deepspeed.tensorboard.output_path",
    "data.fingerprint",
)


def comparison(runs: Sequence[Run]) -> tuple[str, list[Section]]:
    """The header and the sections of a page that compares runs."""
    names = names_of([run.path for run in runs])
    x = tokens_axis([run.history for run in runs])
    curves = _held_out(runs, names, x)
    small = "".join(_small_charts(runs, names, x))
    held = [(name, held_bytes(run.summary)) for name, run in zip(names, runs, strict=True)]
    memory = bars.stacked([(name, parts) for name, parts in held if parts])
    header = f'<div class="top"><h1>{len(runs)} runs</h1></div><p class="method">{escaped(", ".join(names), 600)}</p>'
    return header, [
        Section("results", "Results", _results(runs, names)),
        Section("curves", "Curves", f'{curves}<div class="grid">{small}</div>'),
        Section("memory", "Memory of one rank", card("bytes", "", memory) if memory else ""),
        Section("differences", "Settings that differ", _differences(runs, names)),
    ]


def names_of(paths: Sequence[Path]) -> list[str]:
    """Short names that tell folders apart: the last parts of their paths."""
    for length in range(1, 1 + max(len(path.parts) for path in paths)):
        names = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def _held_out(runs: Sequence[Run], names: Sequence[str], x: Axis) -> str:
    """The held-out losses; the untrained models' would hide how the runs differ, and may lie above the chart."""
    curves, trained = [], []
    for index, (name, run) in enumerate(zip(names, runs, strict=True)):
        history = run.history
        color, dashed = index % COLORS, dash(index)
        if len(history.samples):  # another text than the whole: no line joins the two
            points = thinned(history.samples["tokens"], history.samples["eval_loss"], 300)
            curves.append(Curve(f"{name}, of a sample", *points, color, "dots", dashed))
        points = thinned(history.evaluations["tokens"], history.evaluations["eval_loss"], 300)
        curves.append(Curve(name, *points, color, "points" if len(history.samples) else "dots", dashed))
        trained.append(history.held_out("eval_loss")[history.held_out("step") > 0])
    curves = [curve for curve in curves if not curve.is_empty]
    if not curves:
        return ""
    known = trained if any(np.isfinite(each).any() for each in trained) else [curve.y for curve in curves]
    note = "The losses of the untrained models lie above the chart." if known is trained else ""
    y, title = span(known), "Held-out loss"
    return chart.drawn(
        Chart("held-out", title, x, y, curves, y_label="nats per token", note=note, losses=True, tall=True)
    )


def _small_charts(runs: Sequence[Run], names: Sequence[str], x: Axis) -> list[str]:
    training, speed = [], []
    for index, (name, run) in enumerate(zip(names, runs, strict=True)):
        rows = run.history.training
        training.append(
            Curve(name, *thinned(rows["tokens"], smoothed(rows["loss"]), 500), index % COLORS, "line", dash(index))
        )
        speed.append(mean_curve(name, rows["tokens"], rows["tokens_per_second"], index % COLORS, dash(index)))
    found = []
    for key, title, curves, zero in (
        ("training", "Training loss, smoothed", training, False),
        ("speed", "Tokens per second", speed, True),
    ):
        shown = [curve for curve in curves if not curve.is_empty]
        if shown:
            y = span([curve.y for curve in shown], zero=zero)
            found.append(chart.drawn(Chart(key, title, x, y, shown, losses=not zero)))
    return found


def _results(runs: Sequence[Run], names: Sequence[str]) -> str:
    results = [run.perplexity for run in runs]
    scores = [(result, run.is_of_a_sample) for result, run in zip(results, runs, strict=True) if result is not None]
    # A sample may be an easier text than the whole: it is no rival.
    of_samples = all(is_sample for _, is_sample in scores)
    best = min((result for result, is_sample in scores if is_sample == of_samples), default=None)
    rows = []
    for name, run, result in zip(names, runs, results, strict=True):
        summary, training = run.summary, run.history.training
        tokens = finite(summary.get("tokens")) or (float(training["tokens"][-1]) if len(training) else None)
        speed, peak = finite(summary.get("tokens_per_second")), finite(summary.get("peak_memory_bytes"))
        of_a_sample = '<br><span class="note">of a sample</span>' if run.is_of_a_sample else ""
        held = sum(held_bytes(summary).values())
        is_best = result is not None and result == best and run.is_of_a_sample == of_samples
        mark = '<span class="tag">best</span> ' if is_best else ""
        rows.append(
            (
                f'<b>{escaped(name)}</b><br><span class="note">{escaped(method_of(run))}</span>',
                mark + ("–" if result is None else perplexity(result)) + of_a_sample,
                "–" if tokens is None else short(tokens),
                "–" if not speed else f"{speed:,.0f}",
                human_bytes(held) if held else "–",
                human_bytes(peak) if peak else "–",
                state_of(run),
            )
        )
    columns = ("run", "held-out perplexity", "tokens", "tokens/s", "bytes per rank", "peak of a process", "state")
    return card("runs", "", table(columns, rows, text=(0,)))


def _differences(runs: Sequence[Run], names: Sequence[str]) -> str:
    """Settings that are not the same in all runs; never a secret."""
    settings = [comparable(run.settings) for run in runs]
    keys = [key for key in dict.fromkeys(key for each in settings for key in each) if key not in SAME_OF_ALL]
    keys = [key for key in keys if len({each.get(key) for each in settings}) > 1]
    if not keys:
        return '<p class="note">There are none.</p>'
    shown = keys[:MOST_DIFFERENCES]
    rows = [(escaped(key), *(escaped(each.get(key, "–"), LONGEST_VALUE) for each in settings)) for key in shown]
    note = f"The first {len(shown)} of {len(keys):,}." if len(keys) > len(shown) else ""
    columns = ("setting", *names)
    return card("settings", "", table(columns, rows, text=range(len(columns))), note)
