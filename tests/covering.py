"""Selections of products: few rows in which every pair of values of any two axes still occurs."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import pytest

Row = tuple[Any, ...]
Pair = tuple[int, Any, int, Any]  # two axes, by position, and a value of each


def covering(*axes: Sequence[Any]) -> list[Row]:
    """Rows of the product of some axes in which every pair of values of any two axes occurs; always the same rows.

    Greedy: of all rows the one with the most pairs that no earlier row has, the first of these in the product's order.

    Args:
        *axes: the values of each; hashable, no value twice in one axis.
    """
    rows = list(itertools.product(*axes))
    bit = {pair: 1 << i for i, pair in enumerate(sorted(set().union(*map(pairs, rows)), key=repr))}
    masks = {row: sum(bit[pair] for pair in pairs(row)) for row in rows}
    chosen = [] if bit else rows
    left = sum(bit.values())
    while left:
        best = max(masks, key=lambda row: (masks[row] & left).bit_count())
        chosen.append(best)
        left &= ~masks.pop(best)
    return sorted(chosen, key=lambda row: [axis.index(value) for axis, value in zip(axes, row, strict=True)])


def pairs(row: Row) -> set[Pair]:
    """Every two values of a row, with the axes that they are of."""
    return {(i, row[i], j, row[j]) for i, j in itertools.combinations(range(len(row)), 2)}


def daily_and_slow(*axes: Sequence[Any], turns: Sequence[Sequence[Any]] = ()) -> list[Any]:
    """The product of some axes as pytest's parameters; what is not daily is marked slow.

    Args:
        *axes: whose whole product there is, and whose pairs are daily.
        turns: more axes, whose values take turns: their pairs are daily, too, but they make the product no larger.
    """
    daily = covering(*axes, *turns)
    known = {row[: len(axes)] for row in daily}
    rest = [row for row in itertools.product(*axes) if row not in known]
    slow = [(*row, *(axis[i % len(axis)] for axis in turns)) for i, row in enumerate(rest)]
    return [*daily, *(pytest.param(*row, marks=pytest.mark.slow) for row in slow)]


def slow_but(rows: Iterable[Any], daily: Collection[Any]) -> list[Any]:
    """Rows, or values of one axis, as pytest's parameters; all that are not among the daily ones are marked slow."""
    rows = list(rows)
    assert set(daily) <= set(rows), f"no rows: {set(daily) - set(rows)}"
    slow = {row: pytest.param(*(row if isinstance(row, tuple) else (row,)), marks=pytest.mark.slow) for row in rows}
    return [row if row in daily else slow[row] for row in rows]


def in_turn(cases: Sequence[Row], values: Sequence[Any]) -> list[Any]:
    """Each case with each value appended, as pytest's parameters; daily is one value of each case, in turn."""
    return [
        pytest.param(*case, value, marks=[] if i % len(values) == j else [pytest.mark.slow])
        for i, case in enumerate(cases)
        for j, value in enumerate(values)
    ]
