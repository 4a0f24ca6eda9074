"""Selections of products cover every pair, are the same each time, and are small."""

import itertools

import pytest

from tests.covering import covering, daily_and_slow, pairs, slow_but

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
    daily, slow = told_apart(daily_and_slow(*axes))
    assert daily == covering(*axes)
    assert sorted(daily + slow) == list(itertools.product(*axes))


def test_values_that_take_turns_make_no_more_rows():
    daily, slow = told_apart(daily_and_slow(range(6), range(5), turns=["ab"]))
    assert daily == covering(range(6), range(5), "ab")
    assert sorted(row[:2] for row in daily + slow) == list(itertools.product(range(6), range(5)))
    assert {row[2] for row in slow} <= {"a", "b"}
    daily, slow = told_apart(daily_and_slow(range(9), "xy", "vw", turns=["ab"]))
    assert len(daily + slow) == 36 and {row[3] for row in slow} == {"a", "b"}


def test_a_selection_by_hand():
    rows = list(itertools.product("ab", range(2)))
    assert told_apart(slow_but(rows, [("a", 1), ("b", 0)])) == ([("a", 1), ("b", 0)], [("a", 0), ("b", 1)])
    assert told_apart(slow_but("abc", "b")) == (["b"], [("a",), ("c",)])
    with pytest.raises(AssertionError, match="no rows"):
        slow_but(rows, [("c", 0)])


def told_apart(parameters):
    """Rows without a mark, and those that are marked slow."""
    marked = [each for each in parameters if hasattr(each, "marks")]
    assert all([mark.name for mark in each.marks] == ["slow"] for each in marked)
    return [each for each in parameters if not hasattr(each, "marks")], [each.values for each in marked]
