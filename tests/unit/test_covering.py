"""Selections of products cover every pair, are the same each time, and are small."""

import itertools

import pytest

from tests.covering import covering, daily_and_slow, pairs

AXES = [
    [range(18), range(4), range(1, 5), (1, 4), ("state", "entries")],
    [("a", "b"), (0, 1, 2)],
    [(True, False)] * 6,
    ["xyz"],
]


@pytest.mark.parametrize("axes", AXES, ids=str)
def test_every_pair_occurs(axes):
    rows = covering(*axes)
    found = set().union(*map(pairs, rows))
    for (i, first), (j, second) in itertools.combinations(enumerate(axes), 2):
        assert {(i, a, j, b) for a in first for b in second} <= found
    assert [{row[i] for row in rows} for i in range(len(axes))] == [set(axis) for axis in axes]


@pytest.mark.parametrize("axes", AXES, ids=str)
def test_rows_are_of_the_product_in_its_order_and_not_many(axes):
    rows = covering(*axes)
    product = list(itertools.product(*axes))
    assert rows == [row for row in product if row in set(rows)] == covering(*axes)
    largest = sorted(map(len, axes))[-2:]
    assert len(rows) <= 2 * max(8, largest[0] * largest[-1] if len(axes) > 1 else largest[0])


def test_what_is_left_out_is_slow():
    axes = (range(5), range(4), range(3))
    parameters = daily_and_slow(*axes)
    slow = [each.values for each in parameters if not isinstance(each, tuple)]
    assert [each for each in parameters if isinstance(each, tuple)] == covering(*axes)
    assert sorted(covering(*axes) + slow) == list(itertools.product(*axes))
    assert {mark.name for each in parameters if not isinstance(each, tuple) for mark in each.marks} == {"slow"}


def test_values_that_take_turns_make_no_more_rows():
    parameters = daily_and_slow(range(6), range(5), turns=["ab"])
    rows = [each if isinstance(each, tuple) else each.values for each in parameters]
    assert sorted(row[:2] for row in rows) == list(itertools.product(range(6), range(5)))
    assert [each for each in parameters if isinstance(each, tuple)] == covering(range(6), range(5), "ab")
    assert len(daily_and_slow(range(9), "xy", "vw", turns=["ab"])) == 36
