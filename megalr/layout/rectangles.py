"""Rectangles of logical tensors and the memory that they lie in: what moves state from one layout to another.

A rectangle does not say who held it, so what one layout has written any other can read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megalr.layout.exchange import Field, run_of
from megalr.layout.layout import MATRIX, Layout


@dataclass(frozen=True)
class Piece:
    """One rectangle of a logical tensor.

    Attributes:
        offsets: of its first element, as many as the logical tensor has dimensions.
        data: what is there; a view that may be written.
    """

    offsets: tuple[int, ...]
    data: Tensor


@dataclass(frozen=True)
class Entry:
    """What this rank has of a logical tensor.

    Attributes:
        shape: of the logical tensor: one or two dimensions; see :func:`folded`.
        dtype: of its elements.
        pieces: this rank's; none overlaps another.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[Piece, ...]

    @classmethod
    def of(cls, whole: Tensor) -> Entry:
        """All of a contiguous tensor."""
        data = whole.detach().view(folded(tuple(whole.shape)))
        return cls(tuple(data.shape), whole.dtype, (Piece((0,) * data.ndim, data),))


def folded(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape that a tensor is stored with: a number is a vector, a stack of matrices one tall matrix."""
    if len(shape) < MATRIX:
        return tuple(shape) or (1,)
    return (math.prod(shape[:-1]), shape[-1])


def rectangles(shape: Sequence[int], start: int, run: Tensor, origin: Sequence[int] = (0, 0)) -> list[Piece]:
    """A run of a tensor's elements, row by row, as at most three rectangles.

    Args:
        shape: the tensor's.
        start: the run's first element.
        run: its elements, flat and contiguous.
        origin: where the tensor's own first element lies in a larger one.
    """
    shape = folded(shape)
    if not run.numel():
        return []
    if len(shape) < MATRIX:
        return [Piece((origin[0] + start,), run)]
    width, found, position = shape[1], [], 0
    while position < run.numel():
        row, column = divmod(start + position, width)
        left = run.numel() - position
        # To the end of a row that has begun, else all whole rows, else what there is of the last one.
        size = min(width - column, left) if column or left < width else left // width * width
        data = run[position : position + size]
        data = data.view(-1, width) if size >= width and not column else data.view(1, -1)
        found.append(Piece((origin[0] + row, origin[1] + column), data))
        position += size
    return found


def entry_of(name: str, layout: Layout, rank: int, field: Field, *, once: bool) -> Entry | None:
    """What a rank holds of a parameter in its flat buffers; None if nothing.

    Args:
        name: the parameter's.
        layout: what lies where.
        rank: whose.
        field: the rank's flat buffers.
        once: leave out copies that are cut otherwise than the first one. Where the first is whole, other whole ones are
            kept: a checkpoint takes one of pieces that are alike, and knows no pieces that overlap.
    """
    shape, pieces = layout.shapes[name], []
    alike = len(layout.copy(name, 0)) == 1
    for fragment in layout.on(name, rank):
        if not once or fragment.copy == 0 or (alike and fragment.length == layout.numel(name)):
            pieces += _in_blocks(layout, name, fragment.start, run_of(field, fragment))
    return Entry(folded(shape), pieces[0].data.dtype, tuple(pieces)) if pieces else None


def _in_blocks(layout: Layout, name: str, start: int, run: Tensor) -> list[Piece]:
    """A run in the layout's order of elements, which may be block of columns by block."""
    shape = layout.shapes[name]
    if name not in layout.blocks:
        return rectangles(shape, start, run)
    pieces, begin, column = [], 0, 0
    for width in layout.blocks[name]:
        end = begin + shape[0] * width
        first, last = max(begin, start), min(end, start + run.numel())
        if first < last:
            part = run[first - start : last - start]
            pieces += rectangles((shape[0], width), first - begin, part, (0, column))
        begin, column = end, column + width
    return pieces
