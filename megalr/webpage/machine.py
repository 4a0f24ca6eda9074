"""Sections on the machine: throughput, time of an update, memory over time and by its use."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from megalr.formatting import human_bytes
from megalr.webpage import bars, chart
from megalr.webpage.axes import Axis, span
from megalr.webpage.chart import Chart
from megalr.webpage.curves import Curve, dash, thinned
from megalr.webpage.foreign import finite, number
from megalr.webpage.run import Run
from megalr.webpage.spectra import Spectra
from megalr.webpage.tables import card
from megalr.webpage.training import BLUE, GOLD, GRAY, GREEN, PURPLE, RED, TEAL, mean_curve

# What a rank holds, as summary.json names it.
HELD = {
    "weights": "weights",
    "gradients": "gradients",
    "masters": "fp32 masters",
    "optimizer_state": "optimizer state",
}
# What a checkpoint holds; other kinds are shown under their own names.
STORED = {
    "weights": "fp32 masters",
    "exp_avg": "first moments",
    "exp_avg_sq": "second moments",
    "rule": "states of a rule",
    "frozen": "frozen weights",
}
PARTS = {"forward": BLUE, "backward": RED, "optimizer": GREEN, "exchange": GOLD, "total": GRAY}


def speed_sections(run: Run, x: Axis) -> list[str]:
    """A chart for each of the measurements of speed that the run has."""
    training = run.history.training
    tokens = training["tokens"]
    found = []
    per_rank = mean_curve("tokens per second per rank", tokens, training["tokens_per_second_per_rank"], BLUE)
    overall = mean_curve("tokens per second, all ranks", tokens, training["tokens_per_second"], BLUE)
    for name, title, curve in (
        ("per-rank", "Tokens per second per rank", per_rank),
        ("speed", "Tokens per second", overall),
    ):
        if not curve.is_empty:
            note = "All ranks together, averaged since the start of the process." if curve is overall else ""
            y = span([curve.y], zero=True)
            found.append(chart.drawn(Chart(name, title, x, y, [curve], note=note)))
    flops = mean_curve("model TFLOP/s per rank", tokens, training["tflops_per_rank"], PURPLE)
    if not flops.is_empty:
        found.append(chart.drawn(Chart("flops", "Model TFLOP/s per rank", x, span([flops.y], zero=True), [flops])))
    used = mean_curve("model FLOP utilization", tokens, training["mfu"], PURPLE)
    if not used.is_empty:
        y = span([used.y], zero=True, form="percent")
        found.append(chart.drawn(Chart("mfu", "Model FLOP utilization", x, y, [used])))
    parts = [
        mean_curve(name.replace("_", " "), tokens, training[f"seconds.{name}"], PARTS.get(name, TEAL), dash(index))
        for index, name in enumerate(training.names("seconds.")[:8])
    ]
    parts = [curve for curve in parts if not curve.is_empty]
    if parts:
        y = span([curve.y for curve in parts], zero=True, form="seconds")
        is_part = {"optimizer", "exchange"} <= {curve.name for curve in parts}
        note = "The time of the exchange is a part of the optimizer's." if is_part else ""
        found.append(chart.drawn(Chart("seconds", "Time of an update", x, y, parts, note=note)))
    return found


def memory_sections(run: Run, spectra: Spectra, x: Axis) -> list[str]:
    """Memory over time, and what it is used for."""
    training = run.history.training
    tokens = training["tokens"]
    curves = [
        Curve(name, *thinned(tokens, training[field], 600), color, "line", dashed)
        for name, field, color, dashed in (
            ("in use", "memory_bytes", BLUE, 0),
            ("peak", "peak_memory_bytes", RED, 1),
        )
    ]
    curves = [curve for curve in curves if not curve.is_empty]
    found = []
    if curves:
        y = span([curve.y for curve in curves], zero=True, form="bytes")
        found.append(chart.drawn(Chart("memory-time", "Memory of rank 0", x, y, curves)))
    rows = []
    held = held_bytes(run.summary)
    if held:
        peak = finite(run.summary.get("peak_memory_bytes"))
        words = (
            f"The peak of the whole process, activations and libraries included, was {human_bytes(peak)}."
            if peak
            else ""
        )
        rows.append(card("memory", "Memory of one rank", bars.stacked([("one rank", held)]), words))
    if spectra.sizes:
        stored = {STORED.get(kind, kind): size for kind, size in spectra.sizes.items() if size}
        drawn = bars.stacked([(spectra.checkpoint, stored)])
        rows.append(card("stored", "The newest checkpoint", drawn, "Bytes of its tensors, over all ranks."))
    return found + rows


def held_bytes(summary: Mapping[str, object]) -> dict[str, float]:
    """Bytes of one rank by their use; empty where they are not known."""
    held = summary.get("bytes_per_rank")
    if not isinstance(held, dict):
        return {}
    sizes = {words: number(held.get(name)) for name, words in HELD.items()}
    return {name: size for name, size in sizes.items() if np.isfinite(size) and size > 0}
