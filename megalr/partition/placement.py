"""Who owns what: the one rank that sees a unit's whole matrices.

The choice is a pure function of the layout and the units, so every rank makes the same one without talking.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megalr.partition.layout import Layout


@dataclass(frozen=True)
class Unit:
    """Parameters that one owner has to see together, e.g. the two factors of a low-rank layer.

    Attributes:
        names: qualified names of the parameters.
        cost: what owning it costs, in any unit that is the same for all.
    """

    names: tuple[str, ...]
    cost: float


def place(units: Sequence[Unit], layout: Layout) -> list[int]:
    """The owner of each unit, in the order of ``units``.

    A unit that one rank holds whole stays there: moving it would cost communication, and its cost counts for that
    rank. The others go, costliest first, to the rank with the least so far; among equals to the one that already
    holds most of it, then to the lowest rank.
    """
    load = [0.0] * layout.world_size
    owners: list[int | None] = [None] * len(units)
    homes = [_homes(unit, layout) for unit in units]
    largest_first = sorted(range(len(units)), key=lambda i: (-units[i].cost, i))
    # Fixed ones first: what they add to a rank is known before any choice is made.
    for i in [i for i in largest_first if len(homes[i]) == 1] + [i for i in largest_first if len(homes[i]) != 1]:
        candidates = homes[i] or range(layout.world_size)
        held = {rank: sum(f.length for n in units[i].names for f in layout.on(n, rank)) for rank in candidates}
        owner = min(candidates, key=lambda rank: (load[rank], -held[rank], rank))
        owners[i] = owner
        load[owner] += units[i].cost
    return [owner for owner in owners if owner is not None]


def _homes(unit: Unit, layout: Layout) -> list[int]:
    """The ranks that hold all of a unit's parameters."""
    return [rank for rank in range(layout.world_size) if all(layout.is_whole_on(name, rank) for name in unit.names)]
