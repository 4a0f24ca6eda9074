"""Online Subspace Descent: GaLore whose basis follows an online PCA instead of decompositions, arXiv 2408.12857."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from megalr.errors import UserError
from megalr.rules.adam_moments import adam_direction
from megalr.rules.base import Basis, Rule, Shape, State, count, tensor
from megalr.rules.bases import Projector
from megalr.rules.galore import GaLore
from megalr.rules.projected import project, project_back

# torch.optim.AdamW's defaults, with which the published code moves the basis.
BASIS_BETAS = (0.9, 0.999)
BASIS_EPS = 1e-8
BASIS_WEIGHT_DECAY = 0.01


@dataclass(frozen=True, kw_only=True)
class OnlineSubspaceDescent(GaLore):
    """GaLore's update; after it, one AdamW step of P on ‖P Pᵀ Ĝ - Ĝ‖² with Ĝ = G / ‖G‖, at learning rate 1 / gap.

    The first basis holds the leading singular vectors of the first gradient, which minimise that loss already, so the
    first update leaves it. P is not made orthonormal again. A basis of the whole space stays: its gradient is rounding,
    of which AdamW would make steps of full length. Source: arXiv 2408.12857 and its code ("continuous").

    Attributes:
        update_proj_gap: 1 / learning rate of the basis.
    """

    type_name: ClassVar[str] = "OnlineSubspaceDescent"
    name: ClassVar[str] = "online_subspace_descent"
    unused: ClassVar[frozenset[str]] = frozenset({"moments", "stagger"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.proj_type == "full":
            raise UserError('optimizer.params.proj_type is "full"; Online Subspace Descent has one basis: write "std"')

    def init_state(self, shape: Shape, device: torch.device | str = "cpu") -> State:
        state = super().init_state(shape, device)
        (side,) = self.sides(shape)
        basis = tensor(state, side)
        return {**state, "basis_exp_avg": torch.zeros_like(basis), "basis_exp_avg_sq": torch.zeros_like(basis)}

    def state_numel(self, shape: Shape) -> int:
        size = shape[0] if self.sides(shape) == ("left",) else shape[1]
        return super().state_numel(shape) + 2 * size * self.rank_of(shape)

    def flops(self, shape: Shape) -> float:
        return 10.0 * shape[0] * shape[1] * self.rank_of(shape)

    def projector_at(self, updates: int) -> Projector:
        return "svd" if self.projector == "power" else self.projector  # of the first basis

    def refresh_due(self, state: State, updates: int, phase: int) -> bool:
        return count(state, "refreshes") == 0

    def update(self, grad: Tensor, state: State, basis: Basis | None) -> Tensor:
        self.adopt(state, basis)
        low = project(grad, state)
        update = project_back(adam_direction(low, state, self.betas, self.eps, self.scale), state)
        if basis is None:
            self._move_basis(grad, low, state)
        return update

    def apply(self, weight: Tensor, grad: Tensor, state: State, basis: Basis | None, *, lr: float) -> None:
        Rule.apply(self, weight, grad, state, basis, lr=lr)  # the basis moves behind the update

    def _move_basis(self, grad: Tensor, low: Tensor, state: State) -> None:
        """AdamW on P with the gradient 2 (D (Ĝᵀ P) + Ĝ (Dᵀ P)), D = P Pᵀ Ĝ - Ĝ; everything transposed on the right."""
        (side,) = self.sides((grad.shape[0], grad.shape[1]))
        left = side == "left"
        basis = tensor(state, side)
        if basis.shape[0] == basis.shape[1]:
            return
        norm = grad.norm()
        scale = torch.where(norm > 0, 1 / norm, 0.0)  # a zero gradient says nothing of its subspace
        matrix = (grad if left else grad.T) * scale  # Ĝ, (m, n) or (n, m)
        inner = (low if left else low.T) * scale  # Pᵀ Ĝ
        difference = (basis @ inner).sub_(matrix)
        slope = (difference @ inner.T).add_(matrix @ (difference.T @ basis)).mul_(2)
        moments: State = {
            "step": count(state, "step") - 2,  # the first update has moved no basis, and this one is counted already
            "exp_avg": state["basis_exp_avg"],
            "exp_avg_sq": state["basis_exp_avg_sq"],
        }
        direction = adam_direction(slope, moments, BASIS_BETAS, BASIS_EPS)
        rate = 1 / self.update_proj_gap
        basis.mul_(1 - rate * BASIS_WEIGHT_DECAY).sub_(direction, alpha=rate)
