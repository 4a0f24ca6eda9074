"""What a planted fault is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One fault, and the tests that should notice it.

    Attributes:
        name: unique.
        area: a key of :data:`tests.mutants.areas.AREAS`.
        file: from the repository's root.
        find: the code to replace; it must occur exactly once.
        replace: the fault.
        first: pytest's arguments that select the tests expected to fail, few and fast.
    """

    name: str
    area: str
    file: str
    find: str
    replace: str
    first: str


def mutants(area: str, *rows: tuple[str, str, str, str, str]) -> list[Mutant]:
    """The mutants of an area, from (name, file, find, replace, first)."""
    return [Mutant(name, area, file, find, replace, first) for name, file, find, replace, first in rows]
