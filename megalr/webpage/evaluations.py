"""The table of evaluations of the held-out text."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from megalr.webpage.axes import perplexity
from megalr.webpage.run import Run
from megalr.webpage.tables import card, table

Floats = NDArray[np.float64]

MOST_ROWS = 60


def evaluations_section(run: Run) -> str:
    """The HTML of the table; empty without an evaluation."""
    history = run.history
    columns = [
        history.held_out(name) for name in ("step", "tokens", "epoch", "eval_loss", "eval_perplexity", "is_sample")
    ]
    losses, samples = columns[3], columns[5] > 0
    if not len(losses):
        return ""
    best = _best(losses, samples, columns[0])
    chosen = np.linspace(0, len(losses) - 1, min(MOST_ROWS, len(losses))).astype(int)
    chosen = np.unique([*chosen, *([] if best is None else [best])])
    rows = []
    for row in chosen.tolist():
        step, tokens, epoch, loss, value, is_sample = (float(column[row]) for column in columns)
        mark = ' <span class="tag">best</span>' if row == best else ""
        shown = perplexity(value) if math.isfinite(value) else "–"
        kind = ["a sample" if is_sample else "whole text"] if samples.any() else []
        numbers = (f"{step:,.0f}", f"{tokens:,.0f}", _or_dash(epoch, ".3f"), _or_dash(loss, ".4f"), f"{mark}{shown}")
        rows.append((*numbers, *kind))
    note = f"{len(chosen):,} of {len(losses):,} evaluations." if len(chosen) < len(losses) else ""
    titles = ["step", "tokens", "epoch", "loss", "perplexity", *(["read"] if samples.any() else [])]
    return card("held-out-rows", "", table(titles, rows), note)


def _best(losses: Floats, samples: NDArray[np.bool_], steps: Floats) -> int | None:
    """The trained model's least loss: its row, of the whole text, or of samples where there is no other."""
    good = np.isfinite(losses) & (steps > 0)
    good = good & ~samples if (good & ~samples).any() else good
    return int(np.where(good, losses, np.inf).argmin()) if good.any() else None


def _or_dash(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "not finite" if math.isinf(value) else "–"
