"""Layouts of tensor x data parallelism: every element of every parameter, and of every copy, lies where they say."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from megalr.layout.layout import Fragment, Layout
from megalr.layout.planned import planned_layout
from megalr.layout.tensor_parallel import join

SHAPES = {"q": (6, 5), "o": (5, 6), "bias": (6,), "norm": (5,), "A": (2, 5), "tail": (7, 9)}
CUTS = {"q": 0, "bias": 0, "o": 1, "tail": 1}


def split(size, parts, rng):
    """Sizes of so many parts, none of them empty, of which not all are equal."""
    places = sorted(rng.sample(range(1, size), parts - 1))
    return [b - a for a, b in itertools.pairwise([0, *places, size])]


@pytest.mark.parametrize(("tp", "dp", "stage"), list(itertools.product((1, 2, 3), (1, 2, 3), (0, 1, 3))))
def test_every_element_is_found(tp, dp, stage):
    rng = random.Random(100 * tp + 10 * dp + stage)
    truth = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    sizes = {name: split(SHAPES[name][dim], tp, rng) for name, dim in CUTS.items()}
    parts = [
        {n: w.split(sizes[n], dim=CUTS[n])[t].contiguous() if n in CUTS else w for n, w in truth.items()}
        for t in range(tp)
    ]
    layouts, buffers = [], {}
    ranks = [[d * tp + t for d in range(dp)] for t in range(tp)]
    for t, held in enumerate(parts):
        shapes = [{n: tuple(held[n].shape) for n in group} for group in (("q", "o", "norm"), ("bias", "A", "tail"))]
        layouts.append(planned_layout(shapes, stage=stage, world_size=dp))
        for f in layouts[-1].fragments:
            buffer = buffers.setdefault((ranks[t][f.rank], f.buffer), torch.full((200,), torch.nan))
            buffer[f.offset : f.offset + f.length] = held[f.name].reshape(-1)[f.start : f.start + f.length]
    layout = join(layouts, CUTS, ranks)
    assert layout.world_size == tp * dp
    for name, expected in truth.items():
        copies = {f.copy for f in layout.of(name)}
        assert len(copies) == (dp if stage == 0 else 1) * (1 if name in CUTS else tp)
        assert layout.is_replicated(name) == (
            len(copies) > 1 and all(layout.is_whole_on(name, r) for r in range(tp * dp))
        )
        for rank in range(tp * dp):
            found = [buffers[f.rank, f.buffer][f.offset : f.offset + f.length] for f in layout.cover(name, rank)]
            assert torch.equal(layout.whole(name, torch.cat(found)), expected)
        assert torch.equal(layout.whole(name, layout.flat(name, expected)), expected)


def test_what_a_rank_has_is_taken_from_itself():
    """Of two copies that are cut, the owner reads the one of which it has a part."""
    one = Layout(2, {"A": (2, 3)}, [Fragment("A", 0, 4, 0, 0, 0), Fragment("A", 4, 2, 1, 0, 0)])
    layout = join([one, one], {}, [[0, 2], [1, 3]])
    assert [f.rank for f in layout.cover("A", 3)] == [1, 3]
    assert [f.rank for f in layout.cover("A", 0)] == [0, 2]


def test_parts_that_do_not_fit_are_refused():
    layouts = [planned_layout([{"w": shape}], stage=1, world_size=1) for shape in ((2, 3), (2, 4))]
    with pytest.raises(ValueError, match="w has parts of"):
        join(layouts, {"w": 0}, [[0], [1]])
    assert join(layouts, {"w": 1}, [[0], [1]]).shapes["w"] == (2, 7)


def test_blocks_have_to_be_columns_of_a_matrix():
    with pytest.raises(ValueError, match="no blocks of"):
        Layout(1, {"w": (2, 3)}, [Fragment("w", 0, 6, 0, 0, 0)], {"w": (1, 1)})
