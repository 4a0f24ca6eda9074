"""The table of evaluations of the held-out text."""

from __future__ import annotations

import math

import numpy as np

from megalr.webpage.axes import perplexity
from megalr.webpage.run import Run
from megalr.webpage.tables import card, table

MOST_ROWS = 60


def evaluations_section(run: Run) -> str:
    """The HTML of the table; empty without an evaluation."""
    evaluations = run.history.evaluations
    if not len(evaluations):
        return ""
    columns = [evaluations[name] for name in ("step", "tokens", "epoch", "eval_loss", "eval_perplexity")]
    losses = columns[3]
    good = np.isfinite(losses)
    best = int(np.nanargmin(np.where(good, losses, np.inf))) if good.any() else -1
    chosen = np.unique(np.linspace(0, len(losses) - 1, min(MOST_ROWS, len(losses))).astype(int))
    chosen = np.unique([*chosen, *([best] if best >= 0 else [])])
    rows = []
    for row in chosen.tolist():
        step, tokens, epoch, loss, value = (float(column[row]) for column in columns)
        mark = ' <span class="tag">best</span>' if row == best else ""
        shown = perplexity(value) if math.isfinite(value) else "–"
        rows.append((f"{step:,.0f}", f"{tokens:,.0f}", _or_dash(epoch, ".3f"), _or_dash(loss, ".4f"), f"{mark}{shown}"))
    note = f"{len(chosen):,} of {len(losses):,} evaluations." if len(chosen) < len(losses) else ""
    return card("held-out-rows", "", table(("step", "tokens", "epoch", "loss", "perplexity"), rows), note)


def _or_dash(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "not finite" if math.isinf(value) else "–"
