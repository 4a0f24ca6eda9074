"""Rectangles of runs: each element once, at its place."""

import itertools

import pytest
import torch

from megalr.layout.layout import Fragment, Layout
from megalr.layout.planned import planned_layout
from megalr.layout.rectangles import Entry, entry_of, folded, rectangles


def assembled(shape, pieces):
    """The tensor that pieces make up, -1 where none is; no two may overlap."""
    whole = torch.full(shape, -1.0)
    for piece in pieces:
        place = tuple(slice(o, o + n) for o, n in zip(piece.offsets, piece.data.shape, strict=True))
        assert (whole[place] == -1).all()
        whole[place] = piece.data
    return whole


@pytest.mark.parametrize("shape", [(7,), (4, 5), (1, 6), (6, 1), (2, 3, 4)])
def test_every_run_of_a_tensor_is_at_most_three_rectangles(shape):
    flat = torch.arange(torch.Size(shape).numel(), dtype=torch.float32)
    for first, last in itertools.combinations(range(flat.numel() + 1), 2):
        pieces = rectangles(shape, first, flat[first:last])
        assert 1 <= len(pieces) <= 3
        whole = assembled(folded(shape), pieces).view(-1)
        assert torch.equal(whole[first:last], flat[first:last])
        assert (whole == -1).sum() == flat.numel() - (last - first)


def test_an_empty_run_has_none():
    assert rectangles((3, 4), 5, torch.empty(0)) == []


def test_pieces_are_views():
    flat = torch.zeros(12)
    for piece in rectangles((3, 4), 2, flat[2:9]):
        piece.data.fill_(1)
    assert flat.tolist() == [0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0]


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_all_ranks_together_have_each_element_once(stage, world):
    shapes = {"a": (5, 7), "b": (3,), "c": (2, 3, 4)}
    layout = planned_layout([shapes], stage=stage, world_size=world)
    for name, shape in shapes.items():
        whole, pieces = torch.randn(shape), []
        for rank in range(world):
            size = max((f.offset + f.length for f in layout.fragments if f.rank == rank), default=0)
            buffer = torch.zeros(size)
            for f in layout.on(name, rank):
                buffer[f.offset : f.offset + f.length] = whole.reshape(-1)[f.start : f.start + f.length]
            entry = entry_of(name, layout, rank, [buffer], once=True)
            pieces += entry.pieces if entry else ()
        assert torch.equal(assembled(folded(shape), pieces), whole.view(folded(shape)))


@pytest.mark.parametrize("blocks", [(1, 3), (1, 2, 1), (2, 1, 1)])
def test_a_matrix_that_is_counted_block_by_block(blocks):
    whole = torch.arange(12.0).view(3, 4)
    fragments = [Fragment("w", 0, 2, 0, 0, 0), Fragment("w", 2, 7, 1, 0, 0), Fragment("w", 9, 3, 2, 0, 0)]
    layout = Layout(3, {"w": (3, 4)}, fragments, {"w": blocks})
    flat = layout.flat("w", whole)
    pieces = []
    for f in fragments:
        pieces += entry_of("w", layout, f.rank, [flat[f.start : f.start + f.length]], once=True).pieces
    assert torch.equal(assembled((3, 4), pieces), whole)


def test_of_copies_that_are_cut_in_other_ways_the_first_is_enough():
    cut = [Fragment("w", 0, 4, 0, 0, 0), Fragment("w", 0, 2, 0, 0, 4, 1), Fragment("w", 2, 2, 1, 0, 0, 1)]
    layout = Layout(2, {"w": (4,)}, cut)
    assert len(entry_of("w", layout, 0, [torch.zeros(6)], once=True).pieces) == 1
    assert len(entry_of("w", layout, 0, [torch.zeros(6)], once=False).pieces) == 2
    assert entry_of("w", layout, 1, [torch.zeros(2)], once=True) is None


def test_numbers_and_stacks_are_folded():
    assert Entry.of(torch.tensor(3.0)).shape == (1,)
    assert Entry.of(torch.zeros(2, 3, 4)).shape == (6, 4)


def test_a_whole_copy_is_left_out_where_the_first_is_cut():
    """Tensor-parallel ranks with parts of unequal size: ZeRO cuts a parameter that both have on the first alone."""
    cut = [Fragment("w", 0, 4, 0, 0, 0, 0), Fragment("w", 4, 2, 1, 0, 0, 0)]
    layout = Layout(3, {"w": (2, 3)}, [*cut, Fragment("w", 0, 6, 2, 0, 0, 1)])
    assert [entry_of("w", layout, rank, [torch.zeros(6)], once=True) is None for rank in range(3)] == [
        False,
        False,
        True,
    ]
    assert entry_of("w", layout, 2, [torch.zeros(6)], once=False) is not None
