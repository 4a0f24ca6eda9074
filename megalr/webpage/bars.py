"""Bytes as stacked bars, with a table of the same numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megalr.formatting import human_bytes
from megalr.webpage.chart import COLORS
from megalr.webpage.foreign import escaped

NARROW = 9.0  # percent; a label does not fit into less


def stacked(bars: Sequence[tuple[str, Mapping[str, float]]]) -> str:
    """The HTML of horizontal bars on one scale.

    Args:
        bars: a label each, and bytes by part. A part has the same color in all bars.
    """
    most = max((sum(parts.values()) for _, parts in bars), default=0.0)
    names = list(dict.fromkeys(name for _, parts in bars for name in parts))
    if not most:
        return ""
    colors = {name: index % COLORS for index, name in enumerate(names)}
    legend = "".join(f'<li><i class="swatch b{colors[name]}"></i>{escaped(name)}</li>' for name in names)
    return (
        f'<ul class="legend">{legend}</ul><div class="bars">'
        + "".join(_bar(label, parts, colors, most) for label, parts in bars)
        + "</div>"
    )


def _bar(label: str, parts: Mapping[str, float], colors: Mapping[str, int], most: float) -> str:
    pieces = []
    for name, size in parts.items():
        share = 100 * size / most
        words = f"{name}: {human_bytes(size)}"
        inside = human_bytes(size) if share >= NARROW else ""
        pieces.append(
            f'<div class="piece b{colors[name]}" style="width:{share:.3f}%" title="{escaped(words)}">'
            f"<span>{inside}</span></div>"
        )
    total = human_bytes(sum(parts.values()))
    words = f"{label}: {total} (" + ", ".join(f"{name} {human_bytes(size)}" for name, size in parts.items()) + ")"
    return (
        f'<div class="bar"><div class="bar-label">{escaped(label)} <b>{total}</b></div>'
        f'<div class="stack" role="img" aria-label="{escaped(words)}">{"".join(pieces)}</div></div>'
    )
