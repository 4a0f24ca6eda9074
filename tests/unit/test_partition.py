"""Layouts written by hand, and the owners chosen for them."""

import pytest

from megalr.partition import Fragment, Layout, Unit, buckets, place

# Two ranks; "b" is cut in mid-row, "c" lies on rank 1, "r" is on both ranks whole.
CUT = Layout(
    2,
    {"a": (4, 3), "b": (2, 5), "c": (3, 3)},
    [
        Fragment("a", 0, 12, 0, 0, 0),
        Fragment("b", 0, 7, 0, 0, 12),
        Fragment("b", 7, 3, 1, 0, 0),
        Fragment("c", 0, 9, 1, 0, 3),
    ],
)
REPLICATED = Layout(2, {"r": (2, 2)}, [Fragment("r", 0, 4, rank, 0, 0) for rank in (0, 1)])


def test_questions_to_a_layout():
    assert CUT.is_whole_on("a", 0) and not CUT.is_whole_on("b", 0)
    assert not CUT.is_replicated("b") and REPLICATED.is_replicated("r")
    assert [f.rank for f in CUT.cover("b", 1)] == [0, 1]
    assert [f.rank for f in REPLICATED.cover("r", 1)] == [1]
    assert CUT.on("b", 1) == (Fragment("b", 7, 3, 1, 0, 0),)


def test_a_layout_prints_what_lies_where():
    assert "b (2, 5): [0:7] on rank 0 buffer 0 at 12, [7:10] on rank 1 buffer 0 at 0" in str(CUT)


@pytest.mark.parametrize(
    "fragments",
    [
        [Fragment("a", 0, 3, 0, 0, 0)],
        [Fragment("a", 0, 3, 0, 0, 0), Fragment("a", 4, 2, 1, 0, 0)],
        [Fragment("a", 0, 4, 0, 0, 0), Fragment("a", 2, 2, 1, 0, 0)],
        [],
    ],
)
def test_gaps_and_overlaps_are_refused(fragments):
    with pytest.raises(ValueError, match="is not tiled"):
        Layout(2, {"a": (2, 3)}, fragments)


def test_whole_matrices_stay_and_the_rest_goes_to_the_least_loaded():
    units = [Unit(("a",), 10.0), Unit(("b",), 1.0), Unit(("c",), 2.0)]
    assert place(units, CUT) == [0, 1, 1]


def test_a_tie_goes_to_the_rank_that_holds_most():
    assert place([Unit(("b",), 1.0)], CUT) == [0]


def test_replicated_units_are_shared_evenly():
    layout = Layout(
        3, {f"p{i}": (2, 2) for i in range(9)}, [Fragment(f"p{i}", 0, 4, r, i, 0) for i in range(9) for r in range(3)]
    )
    owners = place([Unit((f"p{i}",), 1.0) for i in range(9)], layout)
    assert sorted(owners) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_fewer_units_than_ranks():
    assert place([Unit(("r",), 1.0)], REPLICATED) == [0]
    assert place([], REPLICATED) == []


def test_buckets_bound_what_an_owner_holds():
    units = [Unit((name,), 1.0) for name in ("a", "b", "c")]
    assert list(buckets(units, [0, 1, 0], CUT, limit=100)) == [[0, 1, 2]]
    assert list(buckets(units, [0, 1, 0], CUT, limit=12)) == [[0, 1], [2]]
    assert list(buckets(units, [0, 1, 0], CUT, limit=1)) == [[0, 1], [2]]
    assert list(buckets([], [], CUT, limit=1)) == []
