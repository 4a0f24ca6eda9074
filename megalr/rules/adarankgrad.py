"""AdaRankGrad: GaLore with a rank that falls with the rank of the gradient, arXiv 2410.17881."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from megalr.errors import UserError
from megalr.rules.base import Basis, State, count, tensor
from megalr.rules.galore import GaLore
from megalr.rules.projected import Moments
from megalr.rules.scaling import in_units_of_largest


@dataclass(frozen=True, kw_only=True)
class AdaRankGrad(GaLore):
    """GaLore's update; at a refresh P keeps the fewest leading singular vectors p_j with Σ ‖p_jᵀ G‖² ≥ η ‖G‖².

    That is a rank of at most the one before, which the paper proves to fall. The moments are carried into the new
    basis. Source: arXiv 2410.17881, algorithm 1, of which no code was found, so that ``energy`` and the schedule are
    choices of ours: the paper leaves a subspace when the projected gradient has become small, which here would be a
    number for the host to read at every update; this rule refreshes as GaLore does. The second moment is carried with
    the squares of the rotation, so that it stays positive.

    State: GaLore's, m r + 2 n r for the largest rank, in which what lies beyond the present one is zero. A run has to
    hold that at its start, so releasing it later would lower no peak; what falls is the rank of the updates.

    Attributes:
        rank: the maximum rank of a basis.
        energy: η, the share of ‖G‖² that a basis keeps.
    """

    type_name: ClassVar[str] = "AdaRankGrad"
    name: ClassVar[str] = "adarankgrad"

    energy: float = 0.99
    projector: Literal["svd", "eigh", "randomized"] = "svd"
    moments: Moments = "transport"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.energy <= 1:
            raise UserError(f"optimizer.params.energy is {self.energy}; write a number in (0, 1]")
        if self.proj_type == "full":
            raise UserError('optimizer.params.proj_type is "full", which AdaRankGrad does not define; write "std"')

    def new_basis(self, grad: Tensor, state: State, *, updates: int, seed: int, name: str) -> Basis:
        ((side, basis),) = super().new_basis(grad, state, updates=updates, seed=seed, name=name).items()
        grad = in_units_of_largest(grad)  # whose squares are of no size of their own
        coordinates = basis.T @ (grad if side == "left" else grad.T)  # (r, n) or (r, m)
        explained = coordinates.square().sum(1).cumsum(0)  # by the first 1, 2, ..., r vectors
        enough = self.energy * grad.square().sum()
        # A vector is needed while those before it are not enough; the first one always is.
        needed = torch.cat([enough.new_ones(1, dtype=torch.bool), explained[:-1] < enough])
        needed |= enough == 0  # a zero gradient says nothing of the rank
        if count(state, "refreshes"):
            needed &= tensor(state, side).any(0)
        return {side: basis * needed}
