"""Who owns what: the one rank that sees a unit's whole matrices.

The choice is a pure function of the layout and the units, so every rank makes the same one without talking.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megalr.layout.layout import Layout


@dataclass(frozen=True)
class Unit:
    """Parameters that one rank has to see together, e.g. the two factors of a low-rank layer.

    Attributes:
        names: qualified names of the parameters.
        owner: the rank that sees them whole.
        cost: what owning them costs, in any unit that is the same for all.
    """

    names: tuple[str, ...]
    owner: int
    cost: float = 0.0


def assign_owners(costs: Mapping[tuple[str, ...], float], layout: Layout) -> list[Unit]:
    """Choose the owner of each unit.

    A unit that one rank holds whole stays there: moving it would cost communication, and its cost counts for that
    rank. The others go, costliest first, to the rank with the least so far; among equals to the one that already
    holds most of it, then to the lowest rank.

    Args:
        costs: what owning each unit costs, by the names of its parameters.
        layout: what lies where.

    Returns:
        The units in the order of ``costs``.
    """
    load = [0.0] * layout.world_size
    owners: dict[tuple[str, ...], int] = {}
    homes = {names: _homes(names, layout) for names in costs}
    largest_first = sorted(costs, key=lambda names: -costs[names])
    # Fixed ones first: what they add to a rank is known before any choice is made.
    for names in sorted(largest_first, key=lambda names: len(homes[names]) != 1):
        candidates = homes[names] or range(layout.world_size)
        held = {rank: sum(f.length for n in names for f in layout.on(n, rank)) for rank in candidates}
        owners[names] = min(candidates, key=lambda rank: (load[rank], -held[rank], rank))
        load[owners[names]] += costs[names]
    return [Unit(names, owners[names], cost) for names, cost in costs.items()]


def imbalance(units: Sequence[Unit], layout: Layout) -> float:
    """The largest rank's cost over the mean."""
    load = [0.0] * layout.world_size
    for unit in units:
        load[unit.owner] += unit.cost
    return max(load) * layout.world_size / sum(load) if any(load) else 1.0


def least_imbalance(units: Sequence[Unit], layout: Layout) -> float:
    """A bound that :func:`imbalance` cannot fall below, whoever the owners are, while what lies whole stays there."""
    world_size = layout.world_size
    fixed, free = [0.0] * world_size, []
    for unit in units:
        homes = _homes(unit.names, layout)
        if len(homes) == 1:
            fixed[homes[0]] += unit.cost
        else:
            free.append(unit.cost)
    mean = (sum(fixed) + sum(free)) / world_size
    everything = _least_pile([unit.cost for unit in units], world_size)
    least = max(mean, *fixed, min(fixed) + _least_pile(free, world_size), everything)
    return least / mean if mean else 1.0


def _least_pile(costs: Sequence[float], world_size: int) -> float:
    """What some rank gets at least: k + 1 of the k P + 1 largest, at best the smallest of them."""
    costs = sorted(costs, reverse=True)
    last = enumerate(range(0, len(costs), world_size))
    return max((sum(costs[end - k : end + 1]) for k, end in last), default=0.0)


def _homes(names: Sequence[str], layout: Layout) -> list[int]:
    """The ranks that hold all of a unit's parameters."""
    return [rank for rank in range(layout.world_size) if all(layout.is_whole_on(name, rank) for name in names)]
