"""What GaLore and its kin have in common: which side is projected, when the basis changes, and what the moments do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from megalr.rules.adam_moments import adam_state, reset_moments, rotate_moments
from megalr.rules.base import Basis, Rule, Shape, State, count, tensor
from megalr.rules.bases import Projector, Side, leading_basis
from megalr.rules.checks import require_positive
from megalr.seeding import generator

ProjType = Literal["std", "reverse_std", "left", "right", "full"]
Moments = Literal["keep", "reset", "transport", "transport_first"]


@dataclass(frozen=True, kw_only=True)
class ProjectedRule(Rule):
    """A rule whose moments live in a rank-r subspace: R = Pᵀ G (left), G Q (right), or Pᵀ G Q (full).

    A matrix that is smaller than the rank in some direction is projected to as much rank as it has.

    Attributes:
        rank: r, the rank of the projection.
        update_proj_gap: updates between two refreshes of a matrix's basis.
        proj_type: the side that is projected. "std" projects the shorter side (the right one of a square matrix),
            "reverse_std" the longer side, "full" both.
        projector: how the basis is computed; see :func:`megalr.rules.bases.leading_basis`.
        moments: what happens to the moments when the basis changes. "keep" leaves them, as the original does; "reset"
            sets them and their count to zero; "transport" rotates them into the new basis, "transport_first" only
            the first one.
        stagger: refresh matrices one after the other, spread over the gap, so that no update refreshes all of them.
            False: refresh all at updates 0, gap, 2 gap, ..., as the original does. The first update computes every
            basis in both cases.
        betas, eps: Adam's.
    """

    rank: int = 128
    update_proj_gap: int = 200
    proj_type: ProjType = "std"
    projector: Projector = "svd"
    moments: Moments = "keep"
    stagger: bool = True
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6

    not_for_factors: ClassVar[str] = "it projects whole weights, and what such layers train is small already"

    def __post_init__(self) -> None:
        require_positive(rank=self.rank, update_proj_gap=self.update_proj_gap)

    def form(self) -> dict[str, str | int | bool]:
        return {**super().form(), "rank": self.rank, "proj_type": self.proj_type}

    def rank_of(self, shape: Shape) -> int:
        return min(self.rank, *shape)

    def sides(self, shape: Shape) -> tuple[Side, ...]:
        """The sides on which an m x n matrix has a basis."""
        tall = shape[0] >= shape[1]
        match self.proj_type:
            case "std":
                return ("right",) if tall else ("left",)
            case "reverse_std":
                return ("left",) if tall else ("right",)
            case "full":
                return ("left", "right")
            case _:
                return (self.proj_type,)

    def basis_keys(self, shape: Shape) -> tuple[str, ...]:
        return self.sides(shape)

    def low_shape(self, shape: Shape) -> Shape:
        """The shape of R."""
        sides, rank = self.sides(shape), self.rank_of(shape)
        return rank if "left" in sides else shape[0], rank if "right" in sides else shape[1]

    def init_state(self, shape: Shape, device: torch.device | str = "cpu") -> State:
        state = adam_state(self.low_shape(shape), device)
        for side in self.sides(shape):
            size = shape[0] if side == "left" else shape[1]
            state[side] = torch.zeros(size, self.rank_of(shape), device=device)
        return {"refreshes": 0, **state}

    def state_numel(self, shape: Shape) -> int:
        low = self.low_shape(shape)
        bases = sum(shape[0] if side == "left" else shape[1] for side in self.sides(shape)) * self.rank_of(shape)
        return 2 * low[0] * low[1] + bases

    def flops(self, shape: Shape) -> float:
        # Two products with the basis. Refreshes are left out: owners, and so checkpoints, must not depend on the gap.
        return 4.0 * shape[0] * shape[1] * self.rank_of(shape)

    def phase(self, index: int, count: int) -> int:
        return index * self.update_proj_gap // count if self.stagger else 0

    def refresh_due(self, state: State, updates: int, phase: int) -> bool:
        return count(state, "refreshes") == 0 or updates % self.update_proj_gap == phase

    def new_basis(self, grad: Tensor, state: State, *, updates: int, seed: int, name: str) -> Basis:
        refreshes = count(state, "refreshes")
        return {
            side: leading_basis(
                grad,
                tensor(state, side).shape[1],
                side,
                self.projector_at(updates),
                previous=tensor(state, side) if refreshes else None,
                generator=generator(seed, name, side, refreshes),
                name=name,
            )
            for side in ("left", "right")
            if side in state
        }

    def projector_at(self, updates: int) -> Projector:
        """How to compute a basis after so many updates."""
        return self.projector

    def adopt(self, state: State, basis: Basis | None) -> None:
        """Make a new basis the state's, and do to the moments what is due; None changes nothing."""
        if basis is None:
            return
        if count(state, "refreshes"):
            if self.moments == "reset":
                reset_moments(state)
            elif self.moments != "keep":
                for side, new in basis.items():
                    turn = new.T @ tensor(state, side)
                    rotate_moments(state, turn, left=side == "left", second=self.moments == "transport")
        for side, new in basis.items():
            tensor(state, side).copy_(new)
        state["refreshes"] = count(state, "refreshes") + 1


def project(grad: Tensor, state: State) -> Tensor:
    """R: Pᵀ G, G Q or Pᵀ G Q, with the bases that the state has."""
    if "left" in state:
        grad = tensor(state, "left").T @ grad
    if "right" in state:
        grad = grad @ tensor(state, "right")
    return grad


def project_back(low: Tensor, state: State) -> Tensor:
    """P R, R Qᵀ or P R Qᵀ: (m, n)."""
    left, right = factors_back(low, state)
    return left @ right


def factors_back(low: Tensor, state: State) -> tuple[Tensor, Tensor]:
    """Two matrices whose product is :func:`project_back`'s."""
    if "right" not in state:
        return tensor(state, "left"), low
    return tensor(state, "left") @ low if "left" in state else low, tensor(state, "right").T


def limit_growth(update: Tensor, state: State, limit: float) -> Tensor:
    """Fira's norm-growth limiter (arXiv 2410.01623): the norm grows by at most ``limit`` from update to update.

    Args:
        update: (m, n); modified in place and returned.
        state: "norm", a scalar tensor: that of the last update, 0 before the first.
        limit: γ > 1.
    """
    # The published 1e-8 lets the norm come back after an update of next to nothing, which 1 % an update would not.
    last = tensor(state, "norm")
    norm = update.norm()
    factor = torch.where(last > 0, (norm / (last + 1e-8)).clamp(min=limit) / limit, 1.0)
    last.copy_(norm / factor)
    return update.div_(factor)
