"""Tables and numbers as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

BYTE_UNITS = ("kB", "MB", "GB", "TB", "PB", "EB")
ROUNDS_TO_A_THOUSAND = 999.5


def human_bytes(number: float) -> str:
    """Bytes in decimal units (1 GB is 1e9 bytes, as papers count) with three digits, e.g. ``"7.41 MB"``."""
    if abs(number) < ROUNDS_TO_A_THOUSAND:
        return f"{number:.0f} B"
    value, unit = number / 1000, 0
    while abs(value) >= ROUNDS_TO_A_THOUSAND and unit < len(BYTE_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:#.3g}".rstrip(".") + f" {BYTE_UNITS[unit]}"


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: bool = True) -> str:
    """A Markdown table; short rows are filled with empty cells.

    Args:
        columns: their titles.
        rows: cells, at most one for each column.
        numbers: align all columns but the first to the right.
    """
    lines = [columns, ["---"] + ["---:" if numbers else "---"] * (len(columns) - 1), *rows]
    return "\n".join(markdown_row([*line, *[""] * (len(columns) - len(line))]) for line in lines)


def markdown_row(cells: Sequence[str]) -> str:
    """One line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def summary_table(rows: Iterable[tuple[str, object] | None]) -> str:
    """Two aligned columns between two rules, without a final newline.

    Args:
        rows: (label, value) pairs; None in place of a pair draws a thin rule. Integers and large floats get
            thousands separators, other floats four significant digits; any other value is shown as its
            ``str``, e.g. what :func:`human_bytes` made.
    """
    cells = [None if row is None else (row[0], _cell(row[1])) for row in rows]
    filled = [cell for cell in cells if cell is not None]
    left = max((len(label) for label, _ in filled), default=0)
    right = max((len(value) for _, value in filled), default=0)
    width = left + 3 + right
    lines = ["-" * width if cell is None else f"{cell[0]:<{left}}   {cell[1]:>{right}}" for cell in cells]
    return "\n".join(["=" * width, *lines, "=" * width])


def _cell(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= ROUNDS_TO_A_THOUSAND else f"{value:.4g}"
