"""Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: bool = True) -> str:
    """A table; short rows are filled up with empty cells.

    Args:
        columns: their titles.
        rows: cells, which may be fewer than the columns.
        numbers: all columns but the first are numbers, aligned right; otherwise everything is text.
    """
    lines = [columns, ["---"] + ["---:" if numbers else "---"] * (len(columns) - 1), *rows]
    return "\n".join(f"| {' | '.join([*line, *[''] * (len(columns) - len(line))])} |" for line in lines)
