"""The layouts that ZeRO makes of parameters, from their shapes alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from megalr.layout.layout import Fragment, Layout

PADDING = 2  # stages 1 and 2 pad each flat group to a multiple of this many elements per rank


def planned_layout(groups: Sequence[Mapping[str, tuple[int, ...]]], *, stage: int, world_size: int) -> Layout:
    """The layout that DeepSpeed makes of parameters with its default options, from their shapes alone.

    Args:
        groups: the shapes of the trainable parameters of each of the optimizer's groups, by name, in order.
        stage: ZeRO stage, 0 to 3; at stage 3 each group is one sub-group.
        world_size: ranks in the data-parallel group.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    fragments: list[Fragment] = []
    for buffer, group in enumerate(groups):
        part = math.ceil(sum(map(math.prod, group.values())) / (PADDING * world_size)) * PADDING
        position = 0
        for name, shape in group.items():
            numel = math.prod(shape)
            if stage == 0:
                fragments += [Fragment(name, 0, numel, rank, len(shapes), 0, copy=rank) for rank in range(world_size)]
            elif stage == 3:
                chunk = math.ceil(numel / world_size)
                fragments += chunks(name, numel, chunk, buffer, position)
                position += chunk
            else:
                fragments += parts(name, position, numel, part, buffer)
                position += numel
            shapes[name] = tuple(shape)
    return Layout(world_size, shapes, fragments)


def chunks(name: str, numel: int, chunk: int, buffer: int, offset: int) -> list[Fragment]:
    """A parameter cut into chunks, rank by rank, each at the same place of its rank's buffer."""
    starts = enumerate(range(0, numel, max(1, chunk)))
    return [Fragment(name, start, min(chunk, numel - start), rank, buffer, offset) for rank, start in starts]


def parts(name: str, begin: int, numel: int, part: int, buffer: int) -> list[Fragment]:
    """A parameter that begins somewhere in a flat tensor, of which each rank has a part."""
    end = begin + numel
    fragments = []
    for rank in range(begin // part, math.ceil(end / part)):
        lower, upper = max(begin, rank * part), min(end, (rank + 1) * part)
        fragments.append(Fragment(name, lower - begin, upper - lower, rank, buffer, lower - rank * part))
    return fragments
