"""What lies where: plain data about how parameters are cut into the ranks' flat buffers.

A layout knows neither DeepSpeed nor processes. It prints, compares, and can be written by hand in a test.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, order=True)
class Fragment:
    """One contiguous, row-major run of a parameter's elements inside one rank's flat buffer.

    Attributes:
        name: the parameter's qualified name.
        start: its first element, counted inside the whole parameter.
        length: how many elements.
        rank: who holds it, counted in the data-parallel group.
        buffer: which of that rank's flat buffers.
        offset: its first element, counted inside that buffer.
    """

    name: str
    start: int
    length: int
    rank: int
    buffer: int
    offset: int


@dataclass(frozen=True)
class Layout:
    """Every parameter's shape, and every fragment of it on every rank.

    A parameter may be held whole by several ranks (ZeRO stage 0), or cut, each element held once (stages 1 to 3).

    Attributes:
        world_size: ranks in the data-parallel group.
        shapes: the logical shape of each parameter, by qualified name.
        fragments: all fragments of all ranks, in any order.
    """

    world_size: int
    shapes: Mapping[str, tuple[int, ...]]
    fragments: Sequence[Fragment]
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
        """Fragments that make up the whole parameter, each element once, from ``rank`` itself where it has all."""
        own = self.on(name, rank)
        if sum(f.length for f in own) == self.numel(name):
            return own
        if self.is_replicated(name):
            return self.on(name, self._by_name[name][0].rank)
        return self._by_name[name]

    def is_replicated(self, name: str) -> bool:
        """Whether some element of the parameter lies on more than one rank; then each holder has all of it."""
        return sum(f.length for f in self._by_name[name]) > self.numel(name)

    def matrices(self, names: Iterable[str]) -> Layout:
        """The layout of the named parameters as matrices.

        A parameter of three dimensions is a stack, and becomes one matrix for each index: ``name[0]``, ``name[1]``, ...
        A vector is a matrix with one row.

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
                        fragments.append(Fragment(matrix, lower - begin, upper - lower, f.rank, f.buffer, offset))
        return Layout(self.world_size, shapes, fragments)

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
        """Each rank's fragments, and all of them unless replicated, must tile the parameter without gap or overlap."""
        numel = self.numel(name)
        groups: list[tuple[Fragment, ...]] = [self._by_name[name]]
        if self.is_replicated(name):
            groups = [self.on(name, rank) for rank in sorted({f.rank for f in self._by_name[name]})]
        for cut in groups:
            position = 0
            for fragment in cut:
                if fragment.start != position or fragment.length <= 0:
                    break
                position += fragment.length
            if position != numel:
                raise ValueError(f"{name} {tuple(self.shapes[name])} is not tiled by its fragments: {cut}")
