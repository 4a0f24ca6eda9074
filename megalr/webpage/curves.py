"""Curves as few points: smoothed by a moving average, and thinned so that no spike is lost."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

MOST_POINTS = 1600  # of a curve on the page
FEWEST_TO_SMOOTH = 10
DASHES = 8  # patterns, and as many colors, of style.py


@dataclass(frozen=True)
class Curve:
    """A line of a chart.

    Attributes:
        name: in the legend.
        x, y: (points,) float64; the line has a gap where y is NaN.
        color: the number of a color of the page's palette.
        kind: "line"; "faint", a thin pale line; "dots", a line with a mark at each point; "points", the marks alone.
        dashed: the number of a dash pattern, 0 for none, so that lines differ by more than their color.
    """

    name: str
    x: Floats
    y: Floats
    color: int
    kind: str = "line"
    dashed: int = 0

    @property
    def is_empty(self) -> bool:
        """Whether there is no point."""
        return not np.isfinite(self.y).any()


def dash(index: int) -> int:
    """The dash pattern of the index-th line, so that lines of the same color have another."""
    return (index + index // DASHES) % DASHES


def smoothed(values: Floats) -> Floats:
    """A moving average over about a thirtieth of the values, centered also near both ends.

    Args:
        values: (n,); what is not finite counts in no average.

    Returns:
        (n,); NaN where nothing in the window is finite.
    """
    good = np.isfinite(values)
    half = max(3, len(values) // 60)
    index = np.arange(len(values))
    reach = np.minimum(half, np.minimum(index, len(values) - 1 - index))
    first, last = index - reach, index + reach
    counts = np.concatenate([[0], np.cumsum(good)])
    known = values[good]
    center = known.mean() if len(known) else 0.0  # differences of large sums lose digits
    sums = np.concatenate([[0.0], np.cumsum(np.where(good, values - center, 0.0))])
    count = counts[last + 1] - counts[first]
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        return np.where(count > 0, center + (sums[last + 1] - sums[first]) / count, np.nan)


def thinned(x: Floats, y: Floats, most: int = MOST_POINTS) -> tuple[Floats, Floats]:
    """At most about ``most`` points of a curve: of each stretch its lowest and its highest, in their order.

    Args:
        x, y: (n,); y may be NaN.

    Returns:
        The points that are kept, which are points of the curve. A stretch without a finite y keeps one NaN.
    """
    y = np.where(np.isfinite(y), y, np.nan)
    if len(y) <= most:
        return x, y
    stretches = most // 2
    edges = np.linspace(0, len(y), stretches + 1).astype(np.int64)
    kept = []
    for begin, end in zip(edges[:-1], edges[1:], strict=True):
        piece = y[begin:end]
        if np.isnan(piece).all():
            kept.append(begin)
        else:
            kept.extend(sorted({begin + int(np.nanargmin(piece)), begin + int(np.nanargmax(piece))}))
    kept = sorted({0, *kept, len(y) - 1})
    return x[kept], y[kept]


def averaged(x: Floats, y: Floats, most: int = MOST_POINTS // 4) -> tuple[Floats, Floats]:
    """At most ``most`` points of a noisy curve: the mean of each stretch, at its last x."""
    y = np.where(np.isfinite(y), y, np.nan)
    if len(y) <= most:
        return x, y
    edges = np.linspace(0, len(y), most + 1).astype(np.int64)
    sums = np.add.reduceat(np.nan_to_num(y), edges[:-1])
    counts = np.add.reduceat(np.isfinite(y), edges[:-1])
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        return x[edges[1:] - 1], np.where(counts > 0, sums / counts, np.nan)
