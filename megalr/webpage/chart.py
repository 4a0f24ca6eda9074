"""Line charts as inline SVG that needs no script; the numbers beside it let the page's script show values and zoom.

The SVG is stretched to the width of its place, and its strokes are not. Labels are HTML around it, so they stay legible
on a narrow screen. Coordinates run from 0 to :data:`SIZE` on both axes, downwards on the second.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megalr.webpage import axes
from megalr.webpage.axes import Axis
from megalr.webpage.curves import Curve
from megalr.webpage.foreign import escaped

Floats = NDArray[np.float64]

SIZE = 1000
COLORS = 8  # of the palette in style.py
DOTTED = ("dots", "points")
X_TICKS = 8  # at most
DIGITS = 8  # of a number that the script shows


@dataclass(frozen=True)
class Mark:
    """Vertical lines at some x, such as those of one kind of event."""

    name: str
    x: Floats
    color: int


@dataclass(frozen=True)
class Level:
    """A horizontal line to compare with, and its label."""

    name: str
    y: float


@dataclass(frozen=True)
class Chart:
    """A chart of curves over one axis.

    Attributes:
        name: unique on the page, of letters, digits and hyphens.
        title: above it.
        x, y: the axes.
        curves: in the order in which they are drawn.
        x_label, y_label: what the axes measure.
        note: a sentence below the title; HTML.
        marks, levels: lines of other kinds.
        group: charts of one group have one x axis, and zoom together; empty for a chart alone.
        losses: whether y is a loss, so that an axis on the right has the perplexities.
        tall: whether it is higher than the others.
        below: HTML below the plot, inside of its margins.
    """

    name: str
    title: str
    x: Axis
    y: Axis
    curves: Sequence[Curve]
    x_label: str = "training tokens"
    y_label: str = ""
    note: str = ""
    marks: Sequence[Mark] = ()
    levels: Sequence[Level] = ()
    group: str = "tokens"
    losses: bool = False
    tall: bool = False
    below: str = ""
    classes: Sequence[str] = field(default=())


def drawn(chart: Chart) -> str:
    """The HTML of a chart: a figure with title, legend, plot, and the numbers for the script."""
    right = "both" if chart.losses else "left"
    classes = " ".join(["chart", *(["tall"] if chart.tall else []), *chart.classes])
    note = f'<p class="note">{chart.note}</p>' if chart.note else ""
    return (
        f'<figure class="{classes}" id="{chart.name}">'
        f"<figcaption><h3>{escaped(chart.title)}</h3>{note}{_legend(chart)}</figcaption>"
        f'<div class="frame {right}">{_titles(chart)}'
        f'<div class="plot" tabindex="0" data-chart="{chart.name}" data-group="{chart.group}">'
        f"{_svg(chart)}{_labels(chart)}</div>"
        f'<div class="xlabel">{escaped(chart.x_label)}</div>{chart.below}</div>'
        f'<script type="application/json">{_numbers(chart)}</script></figure>'
    )


def path_of(xs: Floats, ys: Floats) -> str:
    """The path through points in coordinates of the SVG, with a gap at each NaN."""
    words, pen = [], "M"
    for x, y in zip(xs.tolist(), ys.tolist(), strict=True):
        if math.isnan(x) or math.isnan(y):
            pen = "M"
            continue
        words.append(f"{pen}{_coordinate(x)},{_coordinate(y)}")
        pen = "L"
    return "".join(words)


def across(axis: Axis, values: Floats) -> Floats:
    """Coordinates of values on the first axis."""
    return SIZE * axis.place(values)


def down(axis: Axis, values: Floats) -> Floats:
    """Coordinates of values on the second axis."""
    return SIZE * (1 - axis.place(values))


def as_script_data(content: Any) -> str:
    """JSON that cannot end the script element that it stands in."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _svg(chart: Chart) -> str:
    grid = "".join(f"M0,{_coordinate(float(y))}H{SIZE}" for y in down(chart.y, np.array(chart.y.ticks())))
    parts = [f'<path class="gridline" d="{grid}"/>', '<g class="view">']
    for number, mark in enumerate(chart.marks):
        places = sorted({_coordinate(x) for x in across(chart.x, mark.x).tolist()}, key=float)
        lines = "".join(f"M{x},0V{SIZE}" for x in places)
        parts.append(
            f'<path class="mark c{mark.color} o{number % 2}" d="{lines}"><title>{escaped(mark.name)}</title></path>'
        )
    for level in chart.levels:
        y = _coordinate(float(down(chart.y, np.array([level.y]))[0]))
        parts.append(f'<path class="level" d="M0,{y}H{SIZE}"/>')
    for curve in chart.curves:
        xs, ys = across(chart.x, curve.x), down(chart.y, curve.y)
        parts.append(f'<path class="{_look(curve)}" data-curve="{escaped(curve.name)}" d="{path_of(xs, ys)}"/>')
        if curve.kind in DOTTED or _is_sparse(curve):
            good = np.isfinite(xs) & np.isfinite(ys)
            # A line of no length with round ends is a dot whatever the stretch.
            points = "".join(f"M{_coordinate(x)},{_coordinate(y)}h0" for x, y in zip(xs[good], ys[good], strict=True))
            parts.append(f'<path class="dots c{curve.color}" d="{points}"/>')
    parts.append("</g>")
    words = f"{chart.title}: " + ", ".join(curve.name for curve in chart.curves)
    return (
        f'<svg viewBox="0 0 {SIZE} {SIZE}" preserveAspectRatio="none" role="img" aria-label="{escaped(words)}" '
        f'data-x="{chart.x.low!r} {chart.x.high!r}" data-y="{chart.y.low!r} {chart.y.high!r}" '
        f'data-y-log="{int(chart.y.log)}">{"".join(parts)}</svg>'
    )


def _is_sparse(curve: Curve) -> bool:
    """Whether a line would show nothing of a curve, because no two neighbors are finite."""
    good = np.isfinite(curve.y)
    return bool(good.any() and not (good[1:] & good[:-1]).any())


def _labels(chart: Chart) -> str:
    """Ticks and their labels around the plot."""
    found = []
    for value, place in _placed(chart.y, chart.y.ticks()):
        found.append(f'<span class="y" style="top:{100 - place:.2f}%">{escaped(chart.y.write(value))}</span>')
    for value, place in _placed(chart.x, chart.x.ticks(X_TICKS)):
        found.append(f'<span class="x" style="left:{place:.2f}%">{escaped(chart.x.write(value))}</span>')
    if chart.losses:
        for value, place in _perplexities(chart.y):
            found.append(f'<span class="r" style="top:{100 - place:.2f}%">{axes.short_perplexity(value)}</span>')
    for level in chart.levels:
        place = 100 * float(chart.y.place(np.array([level.y]))[0])
        found.append(f'<span class="at" style="top:{100 - place:.2f}%">{escaped(level.name)}</span>')
    return f'<div class="labels" aria-hidden="true">{"".join(found)}</div>'


def _placed(axis: Axis, ticks: Sequence[float]) -> list[tuple[float, float]]:
    """Ticks, and where they lie in percent."""
    places = axis.place(np.array(ticks, dtype=np.float64))
    return [(tick, 100 * place) for tick, place in zip(ticks, places.tolist(), strict=True) if -1e-9 <= place <= 1]


def _perplexities(y: Axis) -> list[tuple[float, float]]:
    if y.high >= axes.LARGEST_EXPONENT or y.low < 0:
        return []
    ticks = axes.log_ticks(math.exp(y.low), math.exp(y.high), 6)
    places = y.place(np.log(np.array(ticks)))
    return [(tick, 100 * place) for tick, place in zip(ticks, places.tolist(), strict=True)]


def _titles(chart: Chart) -> str:
    right = '<span class="right">perplexity</span>' if chart.losses else ""
    return f'<div class="ylabel"><span>{escaped(chart.y_label)}</span>{right}</div>'


def _legend(chart: Chart) -> str:
    """What the lines are; of a single one the title says it."""
    items = [(_key(curve), curve.name) for curve in chart.curves]
    if len(items) < 2 and not chart.marks:
        return ""
    for mark in chart.marks:
        items.append((f'<path class="line c{mark.color}" d="M12,0V10"/>', f"{mark.name} ({len(mark.x):,})"))
    return (
        '<ul class="legend">'
        + "".join(
            f'<li><svg class="key" viewBox="0 0 24 10" aria-hidden="true">{key}</svg>{escaped(name)}</li>'
            for key, name in items
        )
        + "</ul>"
    )


def _key(curve: Curve) -> str:
    line = f'<path class="{_look(curve)}" d="M0,5H24"/>'
    dot = f'<path class="dots c{curve.color}" d="M12,5h0"/>' if curve.kind in DOTTED else ""
    return line + dot


def _look(curve: Curve) -> str:
    """The classes of a line."""
    kind = f" {curve.kind}" if curve.kind in ("faint", "points") else ""
    return f"line c{curve.color} d{curve.dashed}{kind}"


def _numbers(chart: Chart) -> str:
    return as_script_data(
        {
            "x": _axis(chart.x),
            "y": _axis(chart.y),
            "xLabel": chart.x_label,
            "losses": chart.losses,
            "curves": [
                {"name": curve.name[:200], "color": curve.color, "x": _list(curve.x), "y": _list(curve.y)}
                for curve in chart.curves
            ],
            "marks": [
                {"name": mark.name[:200], "x": _list(np.unique(mark.x)[:400])}
                for mark in itertools.islice(chart.marks, 8)
            ],
        }
    )


def _axis(axis: Axis) -> dict[str, Any]:
    return {"low": axis.low, "high": axis.high, "log": axis.log, "form": axis.form}


def _list(values: Floats) -> list[float | int | None]:
    return [_plain(value) for value in values.tolist()]


def _plain(value: float) -> float | int | None:
    if not math.isfinite(value):
        return None
    return int(value) if value == int(value) and abs(value) < 1e15 else float(f"{value:.{DIGITS}g}")


def _coordinate(value: float) -> str:
    """Two decimals, without zeros behind them; not far outside of what is seen."""
    text = f"{min(max(value, -10 * SIZE), 11 * SIZE):.2f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
