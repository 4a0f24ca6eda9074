"""Weight refactorization of sharded factors: gather each pair at its owner, decompose there, scatter the new pair."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megalr.ops import refactorize, transport_moments
from megalr.partition import Exchange, Item, Layout, Unit, buckets, place
from megalr.partition.exchange import COPIES, Field

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
        return cls(units, place(units, layout))


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
        Names of the layers owned here that were left as they are, because a factor was not finite or the product was
        of lower rank than its factors.
    """
    fields: list[Field] = [masters, *moments] if moments else [masters]
    limit = max(1, bucket_bytes // (COPIES * masters[0].element_size() * len(fields)))
    untouched: list[str] = []
    for bucket in buckets(pairs.units, pairs.owners, exchange.layout, limit):
        items = [Item(name, pairs.owners[i]) for i in bucket for name in pairs.units[i].names]
        whole = exchange.gather(items, fields)
        for i in bucket:
            if pairs.owners[i] == exchange.rank and not _refactorize_one(pairs.units[i], whole):
                untouched.append(pairs.units[i].names[0].removesuffix(".B"))
        exchange.scatter(items, whole, fields)
        del whole  # not to be held through the next gather
    if untouched:
        logger.warning("refactorization left %s as they are: not finite, or of lower rank than r", ", ".join(untouched))
    return untouched


def _refactorize_one(unit: Unit, whole: dict[str, list[Tensor]]) -> bool:
    """Replace the gathered tensors of one pair by the balanced pair's; False when they are to stay."""
    b, a = unit.names
    new = refactorize(whole[b][0].float(), whole[a][0].float())
    if new is None:
        return False
    old_b, old_a = whole[b][1:], whole[a][1:]
    whole[b], whole[a] = [new.B], [new.A]
    if old_b:
        state = {"exp_avg_B": old_b[0], "exp_avg_sq_B": old_b[1], "exp_avg_A": old_a[0], "exp_avg_sq_A": old_a[1]}
        carried = transport_moments(new, state)
        whole[b] += [carried["exp_avg_B"], carried["exp_avg_sq_B"]]
        whole[a] += [carried["exp_avg_A"], carried["exp_avg_sq_A"]]
    return True


def zero_(field: Field, which: Sequence[int]) -> None:
    """Set the named flat buffers to zero, in place."""
    torch._foreach_zero_([field[i] for i in which])
