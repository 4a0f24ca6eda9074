"""A refresh of a projected layer's basis as a function: gradients and the old basis in, the new basis out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megalr.layout.exchange import Exchange
from megalr.rules.bases import Projector, Side, SummedMatrix, leading_basis, random_basis, sketched_basis

logger = logging.getLogger(__name__)

SKETCHING: tuple[Projector, ...] = ("power", "randomized")  # need only products of the gradient with thin matrices


@dataclass(frozen=True)
class FullGradient:
    """The gradient of one layer's whole weight at one update.

    Attributes:
        whole: (m, n), fp32: the sum over all ranks; this rank's summand alone where the projector is one of
            :data:`SKETCHING`.
        low: the sum times the old basis, (m, r) or (r, n): what R's gradient is parallel to.
    """

    whole: Tensor
    low: Tensor


@dataclass(frozen=True)
class Refresh:
    """One basis to be computed.

    Attributes:
        name: of the basis, for messages.
        old: (size, r), fp32: the basis that the layers have.
        gradients: of the layers that share it; empty where the projector is "random".
        side: "right" for W0 + R Qᵀ, "left" for W0 + P R.
        projector: how it is computed.
        is_first: the old basis means nothing, and gives no vector its sign.
        random: for what is random.
        owner: the rank that decomposes, since singular vectors are not reproducible across machines.
        dtype: of the model's weights, which the basis is rounded to.
    """

    name: str
    old: Tensor
    gradients: Sequence[FullGradient]
    side: Side
    projector: Projector
    is_first: bool
    random: torch.Generator
    owner: int
    dtype: torch.dtype


def refresh(due: Sequence[Refresh], exchange: Exchange) -> list[tuple[Tensor, Tensor]]:
    """Compute new bases. Collective; changes nothing.

    Returns:
        For each ``(new, turn)``: the new basis, (size, r), fp32, the same on all ranks; and newᵀ old, (r, r), which
        takes coordinates in the old basis to the new one.
    """
    # All owners decompose before anybody waits for one of them.
    found = [_decompose(each, exchange) for each in due]
    results = []
    for each, basis in zip(due, found, strict=True):
        exchange.broadcast(basis, each.owner)
        exchange.broadcast_replicas(basis)
        new = basis.to(each.dtype).float()
        results.append((new, new.T @ each.old))
    return results


def project(whole: Tensor, basis: Tensor, side: Side) -> Tensor:
    """G Q, (m, r), or Pᵀ G, (r, n)."""
    return whole @ basis if side == "right" else basis.T @ whole


def _decompose(due: Refresh, exchange: Exchange) -> Tensor:
    """A new basis at the owner, or on all ranks where all have to work on it; else memory for it."""
    size, rank = due.old.shape
    previous = None if due.is_first else due.old
    if due.gradients and due.projector in SKETCHING:
        summed = SummedMatrix(_stack([each.whole for each in due.gradients]), exchange.sum_all)
        product = _stack([each.low if due.side == "right" else each.low.T for each in due.gradients])
        found = sketched_basis(
            summed, rank, due.side, due.projector, previous=previous, product=product, generator=due.random
        )
        if torch.isfinite(found).all():
            return found
        logger.warning("%s: %s gave a basis that is not finite; the old one stays", due.name, due.projector)
        return due.old.clone()  # the owner's word counts, so ranks need not agree
    if due.owner != exchange.rank:
        return torch.empty_like(due.old)
    if not due.gradients:
        return random_basis(size, rank, due.random, due.old.device)
    stack = _stack([each.whole for each in due.gradients])
    return leading_basis(stack, rank, due.side, due.projector, previous=previous, generator=due.random, name=due.name)


def _stack(matrices: list[Tensor]) -> Tensor:
    return matrices[0] if len(matrices) == 1 else torch.cat(matrices)
