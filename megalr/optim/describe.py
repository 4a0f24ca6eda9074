"""The table at the start of a run: which parameter is updated by what, where, and what state that takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megalr.layout.layout import Layout
from megalr.optim.groups import ParameterGroup
from megalr.optim.matrices import MatrixUpdater

TITLES = ("parameter", "shape", "group", "rule", "rank", "lr", "owner", "state bytes")


def routing_table(
    groups: Sequence[ParameterGroup],
    layout: Layout,
    looked_after: Mapping[str, tuple[int | None, int | None]],
    matrices: MatrixUpdater | None,
) -> str:
    """See :meth:`megalr.optim.MegalrOptimizer.routing_table`.

    Args:
        groups: as they were given.
        layout: of the masters.
        looked_after: the rank r, and the owner, of parameters that AdamW updates and something else looks after.
        matrices: the rule's, if there is one.
    """
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
