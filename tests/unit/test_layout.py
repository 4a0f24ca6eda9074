"""Layouts written by hand, and the owners chosen for them."""

import math
import random

import pytest
import torch

from megalr.layout.layout import Fragment, Layout
from megalr.layout.placement import Unit, assign_owners
from megalr.layout.planned import planned_layout
from megalr.layout.rounds import split_into_rounds

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
REPLICATED = Layout(2, {"r": (2, 2)}, [Fragment("r", 0, 4, rank, 0, 0, copy=rank) for rank in (0, 1)])


def owners(costs, layout):
    return [unit.owner for unit in assign_owners(costs, layout)]


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
    costs = {("a",): 10.0, ("b",): 1.0, ("c",): 2.0}
    assert assign_owners(costs, CUT) == [Unit(("a",), 0, 10.0), Unit(("b",), 1, 1.0), Unit(("c",), 1, 2.0)]


def test_a_tie_goes_to_the_rank_that_holds_most():
    assert owners({("b",): 1.0}, CUT) == [0]


def test_replicated_units_are_shared_evenly():
    layout = Layout(
        3,
        {f"p{i}": (2, 2) for i in range(9)},
        [Fragment(f"p{i}", 0, 4, r, i, 0, copy=r) for i in range(9) for r in range(3)],
    )
    assert sorted(owners({(f"p{i}",): 1.0 for i in range(9)}, layout)) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_fewer_units_than_ranks():
    assert owners({("r",): 1.0}, REPLICATED) == [0]
    assert assign_owners({}, REPLICATED) == []


def test_rounds_bound_what_an_owner_holds():
    a, b, c = (Unit((name,), owner) for name, owner in (("a", 0), ("b", 1), ("c", 0)))
    assert split_into_rounds([a, b, c], CUT, limit=100) == [[a, b, c]]
    assert split_into_rounds([a, b, c], CUT, limit=12) == [[a, b], [c]]
    assert split_into_rounds([a, b, c], CUT, limit=1) == [[a, b], [c]]
    assert split_into_rounds([], CUT, limit=1) == []


def random_cut(rng, shapes, world_size):
    """Each parameter cut at random places, its pieces on random ranks in one buffer each; some held whole by all."""
    used = [0] * world_size
    fragments = []
    for name, shape in shapes.items():
        numel = math.prod(shape)
        cuts = sorted({0, numel, *(rng.randrange(numel + 1) for _ in range(rng.randrange(7)))})
        for begin, end in zip(cuts, cuts[1:], strict=False):
            rank = rng.randrange(world_size)
            fragments.append(Fragment(name, begin, end - begin, rank, 0, used[rank]))
            used[rank] += end - begin
    return Layout(world_size, shapes, fragments)


@pytest.mark.parametrize("seed", range(20))
def test_a_stack_becomes_its_matrices(seed):
    """Every element of every matrix is found where the layout of matrices says it lies."""
    rng = random.Random(seed)
    world_size = rng.randrange(1, 5)
    shapes = {"flat": (3, 4), "stack": (3, 2, 5), "one": (1, 4, 2), "left out": (7,), "rows": (4, 1, 3)}
    layout = random_cut(rng, shapes, world_size)
    truth = {name: 100 * i + torch.arange(math.prod(s)).view(s) for i, (name, s) in enumerate(shapes.items())}
    buffers = [torch.full((100,), -1) for _ in range(world_size)]
    for f in layout.fragments:
        values = truth[f.name].reshape(-1)[f.start : f.start + f.length]
        buffers[f.rank][f.offset : f.offset + f.length] = values
    matrices = layout.matrices(["rows", "flat", "stack", "one"])
    names = [*(f"rows[{i}]" for i in range(4)), "flat", *(f"stack[{i}]" for i in range(3)), "one[0]"]
    assert list(matrices.shapes) == names
    assert matrices.of("flat") == layout.of("flat")
    for name in names:
        stem, _, index = name.partition("[")
        expected = truth[stem][int(index[:-1])] if index else truth[stem]
        assert matrices.shapes[name] == tuple(expected.shape)
        found = [buffers[f.rank][f.offset : f.offset + f.length] for f in matrices.of(name)]
        assert torch.equal(torch.cat(found).view(expected.shape), expected)


def test_a_stack_that_every_rank_holds():
    layout = Layout(2, {"s": (2, 2, 3)}, [Fragment("s", 0, 12, rank, 0, 4, copy=rank) for rank in (0, 1)]).matrices(
        ["s"]
    )
    assert layout.is_replicated("s[1]")
    assert layout.on("s[1]", 0) == (Fragment("s[1]", 0, 6, 0, 0, 10),)


def test_layouts_planned_from_shapes():
    """13 elements over 2 ranks: parts of 8 at stages 1 and 2, chunks of each parameter at stage 3."""
    groups = [{"a": (3, 3), "b": (4,)}, {"c": (1,)}]
    flat = [Fragment("a", 0, 8, 0, 0, 0), Fragment("a", 8, 1, 1, 0, 0), Fragment("b", 0, 4, 1, 0, 1)]
    shapes = {"a": (3, 3), "b": (4,), "c": (1,)}
    expected = Layout(2, shapes, [*flat, Fragment("c", 0, 1, 0, 1, 0)])
    assert planned_layout(groups, stage=1, world_size=2) == planned_layout(groups, stage=2, world_size=2) == expected
    cut = [Fragment("a", 0, 5, 0, 0, 0), Fragment("a", 5, 4, 1, 0, 0), Fragment("b", 0, 2, 0, 0, 5)]
    expected = Layout(2, shapes, [*cut, Fragment("b", 2, 2, 1, 0, 5), Fragment("c", 0, 1, 0, 1, 0)])
    assert planned_layout(groups, stage=3, world_size=2) == expected
    whole = planned_layout(groups, stage=0, world_size=2)
    assert all(map(whole.is_replicated, shapes)) and [f.buffer for f in whole.of("b")] == [1, 1]


@pytest.mark.parametrize("seed", range(20))
def test_rounds_hold_every_unit_once_and_keep_all_owners_busy(seed):
    rng = random.Random(seed)
    world_size, limit = rng.randrange(1, 6), rng.choice([1, 10, 30, 60, 1000])
    layout = planned_layout(
        [{f"p{i}": (rng.randrange(1, 8), rng.randrange(1, 8)) for i in range(rng.randrange(40))}],
        stage=3,
        world_size=world_size,
    )
    units = [Unit((name,), rng.randrange(world_size)) for name in layout.shapes]
    owners = [unit.owner for unit in units]
    rounds = [[units.index(unit) for unit in units_of] for units_of in split_into_rounds(units, layout, limit)]
    assert sorted(i for indices in rounds for i in indices) == list(range(len(units)))
    last = {owner: max(k for k, r in enumerate(rounds) if i_of(r, owners, owner)) for owner in set(owners)}
    for k, indices in enumerate(rounds):
        assert indices == sorted(indices)
        for owner, end in last.items():
            mine = i_of(indices, owners, owner)
            assert len(mine) <= 1 or sum(layout.numel(units[i].names[0]) for i in mine) <= limit
            assert mine or k > end  # an owner has something to do until it is through
    for owner, end in last.items():  # no more rounds than the owner would need alone
        alone = [units[i] for i in i_of(range(len(units)), owners, owner)]
        assert end + 1 == len(split_into_rounds(alone, layout, limit))


def i_of(indices, owners, owner):
    return [i for i in indices if owners[i] == owner]
