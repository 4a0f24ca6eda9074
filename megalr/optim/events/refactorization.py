"""Weight refactorization of sharded factors: gather each pair at its owner, decompose there, scatter the new pair."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from megalr.layout.exchange import COPIES, Exchange, Field, Item, buckets
from megalr.layout.layout import Layout
from megalr.layout.placement import Unit, assign_owners
from megalr.ops.refactorization import REASONS, refactorize_

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OwnedPairs:
    """The model's low-rank pairs and the rank that refactorizes each.

    Singular vectors are not reproducible across machines, so exactly one rank computes them and the others receive.
    """

    units: list[Unit]
    owners: list[int]

    @classmethod
    def of(cls, pairs: Sequence[tuple[str, str]], layout: Layout) -> OwnedPairs:
        """Choose owners for the (B, A) pairs: cost is the leading flops, (m + n) r²."""
        units = []
        for b, a in pairs:
            (m, r), (_, n) = layout.shapes[b], layout.shapes[a]
            units.append(Unit((b, a), cost=float((m + n) * r * r)))
        return cls(units, assign_owners(units, layout))


def refactorize_pairs(
    pairs: OwnedPairs,
    exchange: Exchange,
    masters: Field,
    moments: tuple[Field, Field] | None,
    bucket_bytes: int,
) -> list[str]:
    """Balance every pair, in place in all ranks' masters.

    Args:
        pairs: what to refactorize, and where.
        exchange: over the group that shares the masters.
        masters: this rank's flat buffers.
        moments: first and second moments in the masters' layout, to be carried into the new factors; None leaves
            them alone.
        bucket_bytes: upper bound of what gathering and scattering hold at a time, unless one pair alone takes more.

    Returns:
        Names of the layers owned here that were left as they are; the log says why.
    """
    fields: list[Field] = [masters, *moments] if moments else [masters]
    limit = max(1, bucket_bytes // (COPIES * masters[0].element_size() * len(fields)))
    untouched: dict[int, list[str]] = {}
    for bucket in buckets(pairs.units, pairs.owners, exchange.layout, limit):
        items = [Item(name, pairs.owners[i]) for i in bucket for name in pairs.units[i].names]
        whole = exchange.gather(items, fields)
        own = [pairs.units[i].names for i in bucket if pairs.owners[i] == exchange.rank]
        # Of each factor the master comes first, then its moments.
        status = refactorize_(
            [whole[b][0] for b, _ in own],
            [whole[a][0] for _, a in own],
            [moment for names in own for name in names for moment in whole[name][1:]],
            "transport" if moments else "keep",
        )
        for (b, _), code in zip(own, status.tolist(), strict=True):
            if code:
                untouched.setdefault(code, []).append(b.removesuffix(".B"))
        for tensors in whole.values():
            for tensor in tensors:
                exchange.broadcast_replicas(tensor)
        exchange.scatter(items, whole, fields)
        del whole  # not to be held through the next gather
    for code, names in sorted(untouched.items()):
        logger.warning("refactorization left %s as they are: %s", ", ".join(names), REASONS[code])
    return [name for names in untouched.values() for name in names]
