"""Rows of the tables in docs/benchmark.md, so that a page quotes measurements and never repeats them by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megalr.formatting import markdown_row

BENCHMARK = Path(__file__).resolve().parents[1] / "benchmark.md"
# The heading, the command that made its table, the columns to quote, and the row to compare with.
SOURCES = {
    "paper_tiny": (
        "### The paper's comparison at tiny size",
        "python launchers/compare.py --recipe launchers/recipes/paper_tiny.yaml --output runs/paper_tiny",
        ("method", "test perplexity", "best rate", "trained parameters", "papers' memory"),
        ("full rank, AdamW",),
    ),
    "projected": (
        "### Projected layers, GaLore, low-rank factors and full rank",
        "python launchers/compare.py --recipe launchers/recipes/projected.yaml --output runs/projected",
        ("method", "perplexity", "best rate", "trained parameters", "papers' memory"),
        ("full-rank AdamW",),
    ),
    "merge_rounding": (
        "### Rounding W0 + R·Qᵀ to bf16",
        "python launchers/compare.py --recipe launchers/recipes/merge_rounding.yaml --output runs/merge_rounding",
        ("rounding", "test perplexity", "optimizer state", "bytes more than nearest"),
        (),
    ),
    "optimizer": (
        "## Optimizer steps",
        "python launchers/benchmark.py optimizer",
        ("optimizer", "median ms", "99th percentile", "/ galore-torch"),
        ("torch AdamW",),
    ),
}


def quoted(source: str, labels: Sequence[str]) -> str:
    """A table with some rows of a table of docs/benchmark.md, with the command that made it above.

    Args:
        source: one of :data:`SOURCES`.
        labels: first cells of the rows; the first table that has them all is taken.

    Raises:
        LookupError: there are no such rows.
    """
    heading, command, columns, baseline = SOURCES[source]
    wanted = [*baseline, *(label for label in labels if label not in baseline)]
    for table in _tables(heading):
        rows = {row[0]: row for row in table[2:]}
        if all(label in rows for label in wanted):
            places = [table[0].index(column) for column in columns]
            shown = [table[0], table[1], *(rows[label] for label in wanted)]
            lines = [markdown_row([line[place] for place in places]) for line in shown]
            anchor = heading.lstrip("# ")
            return f"`{command}`, under [{anchor}](../benchmark.md#{slug(anchor)}):\n\n" + "\n".join(lines)
    raise LookupError(f'docs/benchmark.md has no table under "{heading}" with the rows {wanted}')


def slug(heading: str) -> str:
    """The anchor that GitHub and MyST give a heading."""
    kept = "".join(sign for sign in heading.lower() if sign.isalnum() or sign in " -_")
    return kept.replace(" ", "-")


def _tables(heading: str) -> list[list[list[str]]]:
    """The tables under a heading, up to the next one, as cells."""
    text = BENCHMARK.read_text(encoding="utf-8").partition(f"\n{heading}\n")[2]
    found: list[list[list[str]]] = [[]]
    for line in text.splitlines():
        if line.startswith("#"):
            break
        if line.startswith("|"):
            found[-1].append([cell.strip() for cell in line.strip("|").split(" | ")])
        elif found[-1]:
            found.append([])
    return [table for table in found if table]
