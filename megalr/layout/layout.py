"""What lies where: plain data about how parameters are cut into the ranks' flat buffers.

A layout knows neither DeepSpeed nor processes. It prints, compares, and can be written by hand in a test.

Elements of a parameter are counted row by row. Where tensor parallelism cuts a matrix by columns they are counted block
of columns by block, row by row inside each, so that what a rank holds is one run however it is cut.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

MATRIX = 2  # dimensions


@dataclass(frozen=True, order=True)
class Fragment:
    """One contiguous run of a parameter's elements, in their order, inside one rank's flat buffer.

    Attributes:
        name: the parameter's qualified name.
        start: its first element, counted inside the whole parameter.
        length: how many elements.
        rank: who holds it, counted in the group that shares the parameters.
        buffer: which of that rank's flat buffers.
        offset: its first element, counted inside that buffer.
        copy: which of the parameter's copies it belongs to, where there are several.
    """

    name: str
    start: int
    length: int
    rank: int
    buffer: int
    offset: int
    copy: int = 0


@dataclass(frozen=True)
class Layout:
    """Every parameter's shape, and every fragment of it on every rank.

    A parameter may be cut, each element held once (ZeRO stages 1 to 3), or there are several copies of it, each of
    them whole on a rank (stage 0) or cut (what all tensor-parallel ranks have, at stages 1 to 3).

    Attributes:
        world_size: ranks in the group that shares the parameters.
        shapes: the logical shape of each parameter, by qualified name.
        fragments: all fragments of all ranks, in any order.
        blocks: of a matrix that is cut by columns, how many each block has; see above.
    """

    world_size: int
    shapes: Mapping[str, tuple[int, ...]]
    fragments: Sequence[Fragment]
    blocks: Mapping[str, Sequence[int]] = field(default_factory=dict)
    _by_name: dict[str, tuple[Fragment, ...]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        by_name: dict[str, list[Fragment]] = {name: [] for name in self.shapes}
        for fragment in self.fragments:
            by_name[fragment.name].append(fragment)
        object.__setattr__(self, "_by_name", {name: tuple(sorted(cut)) for name, cut in by_name.items()})
        for name in self.shapes:
            self._check(name)

    def numel(self, name: str) -> int:
        """Elements of one parameter."""
        return math.prod(self.shapes[name])

    def of(self, name: str) -> tuple[Fragment, ...]:
        """All fragments of one parameter, by start and then by rank."""
        return self._by_name[name]

    def on(self, name: str, rank: int) -> tuple[Fragment, ...]:
        """The fragments of one parameter that one rank holds, by start."""
        return tuple(f for f in self._by_name[name] if f.rank == rank)

    def is_whole_on(self, name: str, rank: int) -> bool:
        """Whether one rank holds all of a parameter."""
        return sum(f.length for f in self._by_name[name] if f.rank == rank) == self.numel(name)

    def cover(self, name: str, rank: int) -> tuple[Fragment, ...]:
        """Fragments that make up the whole parameter, each element once: the copy of which ``rank`` has most."""
        held = {f.copy: 0 for f in self._by_name[name]}
        for f in self.on(name, rank):
            held[f.copy] += f.length
        return self.copy(name, max(held, key=lambda copy: (held[copy], -copy)))

    def copy(self, name: str, number: int) -> tuple[Fragment, ...]:
        """The fragments of one of a parameter's copies, by start."""
        return tuple(f for f in self._by_name[name] if f.copy == number)

    def is_replicated(self, name: str) -> bool:
        """Whether there are several ranks, and each has a parameter whole."""
        return self.world_size > 1 and all(self.is_whole_on(name, rank) for rank in range(self.world_size))

    def flat(self, name: str, whole: Tensor) -> Tensor:
        """A parameter's elements in their order; a view where that is row by row."""
        if name not in self.blocks:
            return whole.reshape(-1)
        return torch.cat([block.reshape(-1) for block in whole.split(list(self.blocks[name]), dim=1)])

    def whole(self, name: str, flat: Tensor) -> Tensor:
        """A parameter from its elements in their order; a view where that is row by row."""
        if name not in self.blocks:
            return flat.view(self.shapes[name])
        rows, widths = self.shapes[name][0], self.blocks[name]
        blocks = flat.split([rows * width for width in widths])
        return torch.cat([block.view(rows, width) for block, width in zip(blocks, widths, strict=True)], dim=1)

    def matrices(self, names: Iterable[str]) -> Layout:
        """The layout of the named parameters as matrices.

        A parameter of three dimensions is a stack, and becomes one matrix for each index: ``name[0]``, ``name[1]``, ...
        A vector is a matrix with one row. Blocks of columns are kept.

        Args:
            names: of parameters with one to three dimensions.
        """
        shapes: dict[str, tuple[int, ...]] = {}
        fragments: list[Fragment] = []
        for name in names:
            *stack, m, n = (1, *self.shapes[name])[-max(2, len(self.shapes[name])) :]
            if not stack:
                shapes[name] = (m, n)
                fragments += self.of(name)
                continue
            for index in range(math.prod(stack)):
                matrix, begin, end = f"{name}[{index}]", index * m * n, (index + 1) * m * n
                shapes[matrix] = (m, n)
                for f in self.of(name):
                    lower, upper = max(begin, f.start), min(end, f.start + f.length)
                    if lower < upper:
                        offset = f.offset + lower - f.start
                        fragments.append(
                            Fragment(matrix, lower - begin, upper - lower, f.rank, f.buffer, offset, f.copy)
                        )
        return Layout(self.world_size, shapes, fragments, {n: w for n, w in self.blocks.items() if n in shapes})

    def __str__(self) -> str:
        lines = [f"{self.world_size} ranks, {len(self.shapes)} parameters"]
        for name, shape in self.shapes.items():
            cut = ", ".join(
                f"[{f.start}:{f.start + f.length}] on rank {f.rank} buffer {f.buffer} at {f.offset}"
                for f in self.of(name)
            )
            lines.append(f"{name} {tuple(shape)}: {cut}")
        return "\n".join(lines)

    def _check(self, name: str) -> None:
        """The fragments of each copy must tile the parameter without gap or overlap."""
        numel = self.numel(name)
        for cut in [self.copy(name, number) for number in {0, *(f.copy for f in self._by_name[name])}]:
            position = 0
            for fragment in cut:
                if fragment.start != position or fragment.length <= 0:
                    break
                position += fragment.length
            if position != numel:
                raise ValueError(f"{name} {tuple(self.shapes[name])} is not tiled by its fragments: {cut}")
        if name in self.blocks and (len(self.shapes[name]) != MATRIX or sum(self.blocks[name]) != self.shapes[name][1]):
            raise ValueError(f"{name} {tuple(self.shapes[name])} has no blocks of {self.blocks[name]} columns")
