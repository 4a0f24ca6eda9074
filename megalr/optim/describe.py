"""The tables at the start of a run: which parameter is updated by what, where, and what state that takes."""

from __future__ import annotations

from collections.abc import Sequence

from megalr.layout.layout import Layout
from megalr.optim.events.base import Event
from megalr.optim.groups import ParameterGroup
from megalr.optim.matrices import MatrixUpdater

TITLES = ("parameter", "shape", "group", "rule", "rank", "lr", "owner", "state bytes")


def routing_table(
    groups: Sequence[ParameterGroup], layout: Layout, events: Sequence[Event], matrices: MatrixUpdater | None
) -> str:
    """One line for each parameter or matrix: shape, group, rule, its rank, learning rate, owner, bytes of state.

    The owner is the rank that runs the rule, refactorizes the factor or computes the projected layer's basis; what
    is element-wise has none. A last line says how evenly the rule's state is spread over the ranks.

    Args:
        groups: as they were given to the optimizer.
        layout: of the masters.
        events: of the optimizer.
        matrices: what runs the rule, if there is one.
    """
    looked_after = {name: route for event in events for name, route in event.routes().items()}
    rows = [TITLES]
    for group in groups:
        lr = f"{group.settings.lr:g}"  # the schedule's own is that of its first step already
        if group.rule is not None and matrices is not None:
            rows += [(*row[:2], group.name, *row[2:4], lr, *row[4:]) for row in matrices.routes(group.parameters)]
            continue
        for name in group.parameters:
            if name in layout.shapes:
                shape = " x ".join(map(str, layout.shapes[name]))
                rank, owner = ("-" if v is None else str(v) for v in looked_after.get(name, (None, None)))
                rows.append((name, shape, group.name, "adamw", rank, lr, owner, f"{2 * 4 * layout.numel(name):,}"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(TITLES))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    if matrices is not None and (balance := matrices.balance()) is not None:
        found, least = balance
        lines.append(
            f"state bytes of {matrices.rule_name} by rank: "
            f"largest {found:.2f} x the mean; these shapes and cuts allow {least:.2f}"
        )
    return "\n".join(lines)


def summary(
    groups: Sequence[ParameterGroup],
    layout: Layout,
    events: Sequence[Event],
    matrices: MatrixUpdater | None,
    parametrization: str,
) -> str:
    """One line for the replaced layers, and one for each rule: how many parameters or matrices, how many elements.

    Args:
        groups, layout, events, matrices: as in :func:`routing_table`.
        parametrization: the type of the layers that have factors.
    """
    lines, owned = [], set()
    factors = [
        name for group in groups if group.name == "factors" for name in group.parameters if name in layout.shapes
    ]
    if factors:
        layers = {name.rpartition(".")[0] for name in factors}
        size = sum(map(layout.numel, factors))
        lines.append(f"{parametrization}: {len(layers)} layers, whose factors have {size:,} elements")
    if matrices is not None:
        owned = matrices.parameters
        ranks = sorted({rank for m in matrices.matrices if (rank := m.rule.rank_of(m.shape)) is not None})
        projected = f" projected to rank {'-'.join(map(str, sorted({ranks[0], ranks[-1]})))}" if ranks else ""
        size = sum(m.shape[0] * m.shape[1] for m in matrices.matrices)
        lines.append(f"{matrices.rule_name}: {len(matrices.matrices)} matrices with {size:,} elements{projected}")
    lines += [line for event in events if (line := event.summary())]
    rest = [name for name in layout.shapes if name not in owned]
    lines.append(f"adamw: {len(rest)} parameters with {sum(map(layout.numel, rest)):,} elements")
    return "\n".join(lines)
