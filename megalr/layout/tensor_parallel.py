"""One layout for all ranks of tensor x data parallelism, from those of the data-parallel groups.

Each tensor-parallel rank has parameters of its own, a part or a copy of what the model has, and ZeRO cuts them over
the rank's data-parallel group as it cuts any. What follows knows the whole: a matrix of which every tensor-parallel
rank has rows or columns is one parameter whose fragments lie on all ranks, and one that all have exists in copies.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from megalr.layout.layout import Fragment, Layout


def join(layouts: Sequence[Layout], cuts: Mapping[str, int], ranks: Sequence[Sequence[int]]) -> Layout:
    """The layout of what several data-parallel groups hold together.

    Args:
        layouts: of each tensor-parallel rank's data-parallel group, with that rank's shapes; the same names in all.
        cuts: the dimension in which tensor parallelism cuts a parameter, 0 or 1; of the others every tensor-parallel
            rank has a copy.
        ranks: of each tensor-parallel rank, its data-parallel ranks, counted in the group of all.

    Raises:
        ValueError: the parts do not make up one parameter.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    blocks: dict[str, tuple[int, ...]] = {}
    fragments: list[Fragment] = []
    for name in layouts[0].shapes:
        parts = [layout.shapes[name] for layout in layouts]
        dim = cuts.get(name)
        shapes[name] = _joined(name, parts, dim)
        if dim == 1:
            blocks[name] = tuple(part[1] for part in parts)
        begin = copies = 0
        for layout, members, part in zip(layouts, ranks, parts, strict=True):
            for f in layout.of(name):
                fragments.append(replace(f, start=begin + f.start, rank=members[f.rank], copy=copies + f.copy))
            if dim is None:
                copies += 1 + max(f.copy for f in layout.of(name))
            else:
                begin += math.prod(part)
    return Layout(sum(map(len, ranks)), shapes, fragments, blocks)


def _joined(name: str, parts: Sequence[tuple[int, ...]], dim: int | None) -> tuple[int, ...]:
    """The shape of the whole parameter."""
    first = parts[0]
    rest = {part if dim is None else (*part[:dim], *part[dim + 1 :]) for part in parts}
    if len(rest) > 1:
        raise ValueError(f"{name} has parts of {', '.join(map(str, parts))}, which are none of one parameter")
    return first if dim is None else (*first[:dim], sum(part[dim] for part in parts), *first[dim + 1 :])
