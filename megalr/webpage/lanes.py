"""Events as lanes below a chart: a row for each kind, a tick for each time."""

from __future__ import annotations

from collections.abc import Sequence

from megalr.webpage.axes import Axis
from megalr.webpage.chart import SIZE, Mark, across
from megalr.webpage.foreign import escaped

PLACES = 2000  # ticks that can be told apart


def drawn(axis: Axis, marks: Sequence[Mark]) -> str:
    """The HTML of the lanes, which lie on the x axis of the chart above; empty without events."""
    return "".join(_lane(axis, mark) for mark in marks)


def _lane(axis: Axis, mark: Mark) -> str:
    places = sorted({round(x * PLACES / SIZE) for x in across(axis, mark.x).tolist()})
    ticks = "".join(f"M{place * SIZE / PLACES:g},0v10" for place in places)
    words = f"{mark.name}: {len(mark.x):,}"
    return (
        f'<div class="lane"><span class="c{mark.color}">{escaped(mark.name)} <b>{len(mark.x):,}</b></span>'
        f'<svg viewBox="0 0 {SIZE} 10" preserveAspectRatio="none" role="img" aria-label="{escaped(words)}">'
        f'<g class="view"><path class="tick c{mark.color}" d="{ticks}"/></g></svg></div>'
    )
