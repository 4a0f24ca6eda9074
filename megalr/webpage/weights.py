"""The section of spectra: small charts of singular values, and a table of ranks."""

from __future__ import annotations

from itertools import groupby

import numpy as np

from megalr.webpage import chart
from megalr.webpage.axes import Axis, span
from megalr.webpage.chart import Chart
from megalr.webpage.curves import Curve, thinned
from megalr.webpage.foreign import escaped
from megalr.webpage.spectra import LARGEST_EXACT, LEADING, Spectra, Spectrum
from megalr.webpage.tables import card, table
from megalr.webpage.training import BLUE, GREEN, RED

DEFINITION = (
    "The effective rank is the exponential of the entropy of the singular values divided by their sum (Roy and "
    "Vetterli, 2007). The stable rank is the squared Frobenius norm divided by the largest squared singular value."
)
FLOOR = 1e-7  # of the largest value: smaller ones are rounding


def spectra_sections(spectra: Spectra) -> tuple[str, list[str]]:
    """An introduction, and the charts with the table behind them; no charts where there is no spectrum."""
    notes = "".join(f'<p class="note">{escaped(note, 1000)}</p>' for note in spectra.notes)
    if not spectra.found:
        return notes, []
    middle = (
        f"Singular values of weights in checkpoint {escaped(spectra.checkpoint)} ({spectra.updates:,} updates), of the "
        "product where a weight is made of factors: the first, the middle and the last block of the model. "
    )
    intro = f'<p class="note">{middle}{DEFINITION}</p>{notes}'
    if not all(one.is_whole for one in spectra.found):
        intro += (
            f'<p class="note">For a matrix larger than {LARGEST_EXACT:,} in both dimensions, a randomized method '
            f"computes the leading {LEADING} values. The effective rank needs all values and is not shown.</p>"
        )
    kinds = [(kind, list(found)) for kind, found in groupby(spectra.found, key=lambda one: one.kind)]
    charts = [_chart(index, kind, found) for index, (kind, found) in enumerate(kinds)]
    return intro, [*charts, _table(spectra.found)]


def _chart(index: int, kind: str, found: list[Spectrum]) -> str:
    curves = []
    for place, one in enumerate(found):
        values = np.where(one.values > FLOOR * one.values.max(initial=0), one.values, np.nan)
        x, y = thinned(np.arange(1, len(values) + 1, dtype=np.float64), values, 400)
        curves.append(Curve(f"block {one.block}", x, y, (BLUE, RED, GREEN)[place % 3], "line", place))
    longest = max(len(one.values) for one in found)
    x_axis = Axis(1.0, float(max(longest, 2)), form="whole")
    y_axis = span([curve.y for curve in curves], log=True)
    shape = " x ".join(f"{size:,}" for size in found[0].shape)
    return chart.drawn(
        Chart(
            f"spectrum-{index}",
            kind,
            x_axis,
            y_axis,
            curves,
            x_label="index",
            note=f"{shape}",
            group=f"spectrum-{index}",
            classes=("small",),
        )
    )


def _meter(share: float) -> str:
    """A share as a small bar and in percent."""
    return f'<span class="meter"><i style="width:{100 * share:.1f}%"></i></span>{share:.0%}'


def _table(found: list[Spectrum]) -> str:
    rows = []
    for one in found:
        effective = one.effective_rank
        rows.append(
            (
                escaped(one.kind),
                f"{one.block}",
                "–" if effective is None else f"{effective:,.1f}",
                "–" if effective is None else _meter(effective / min(one.shape)),
                f"{one.stable_rank:,.1f}",
                f"{one.values[0]:.4g}" if len(one.values) else "–",
                " x ".join(f"{size:,}" for size in one.shape),
            )
        )
    columns = ("matrix", "block", "effective rank", "of full rank", "stable rank", "largest value", "shape")
    return card("ranks", "Ranks", table(columns, rows, text=(0,)), wide=True)
