"""Online Subspace Descent: GaLore with a basis that is trained instead of decomposed anew, arXiv 2408.12857."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from megalr.errors import UserError
from megalr.rules.adam_moments import adam_direction
from megalr.rules.base import Basis, Rule, Shape, State, count, tensor
from megalr.rules.bases import Projector
from megalr.rules.galore import GaLore
from megalr.rules.projected import project, project_back
from megalr.rules.scaling import unit

# torch.optim.AdamW's defaults, with which the published code moves the basis.
BASIS_BETAS = (0.9, 0.999)
BASIS_EPS = 1e-8
BASIS_WEIGHT_DECAY = 0.01


@dataclass(frozen=True, kw_only=True)
class OnlineSubspaceDescent(GaLore):
    """GaLore's update; after it, one AdamW step of P on ‖P Pᵀ Ĝ - Ĝ‖² with Ĝ = G / ‖G‖, at learning rate s / gap.

    s is the learning rate of the update over ``optimizer.params.lr``, so that P follows the schedule of the weights.
    The first basis holds the leading singular vectors of the first gradient, which minimise that loss already, so the
    first update leaves it. P is not made orthonormal again. A basis of the whole space stays: its gradient is rounding,
    of which AdamW would make steps of full length. Source: arXiv 2408.12857 and its code ("continuous").

    Attributes:
        update_proj_gap: the basis has the learning rate 1 / ``update_proj_gap`` when the weights have ``lr``.
        basis_lr: "scheduled" lets the learning rate of the basis follow the schedule of the weights; "constant" does
            not.
    """

    type_name: ClassVar[str] = "OnlineSubspaceDescent"
    name: ClassVar[str] = "online_subspace_descent"
    unused: ClassVar[frozenset[str]] = frozenset({"moments", "stagger", "schedule"})
    former_defaults: ClassVar[Mapping[str, object]] = {"basis_lr": "constant"}

    basis_lr: Literal["scheduled", "constant"] = "scheduled"
    schedule: float = 1.0  # s of one update; see scheduled()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.proj_type == "full":
            raise UserError('optimizer.params.proj_type is "full"; Online Subspace Descent has one basis: write "std"')

    def scheduled(self, factor: float) -> Rule:
        return self if self.basis_lr == "constant" else replace(self, schedule=factor)

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
            self._move_basis(grad, state)
        return update

    def apply(self, weight: Tensor, grad: Tensor, state: State, basis: Basis | None, *, lr: float) -> None:
        Rule.apply(self, weight, grad, state, basis, lr=lr)  # the basis moves behind the update

    def _move_basis(self, grad: Tensor, state: State) -> None:
        """AdamW on P with the gradient 2 (D (Ĝᵀ P) + Ĝ (Dᵀ P)), D = P Pᵀ Ĝ - Ĝ; everything transposed on the right."""
        (side,) = self.sides((grad.shape[0], grad.shape[1]))
        basis = tensor(state, side)
        if basis.shape[0] == basis.shape[1]:
            return
        matrix = unit(grad if side == "left" else grad.T)  # Ĝ, (m, n) or (n, m); a zero gradient gives zero
        inner = basis.T @ matrix  # Pᵀ Ĝ
        difference = (basis @ inner).sub_(matrix)
        slope = (difference @ inner.T).add_(matrix @ (difference.T @ basis)).mul_(2)
        moments: State = {
            "step": count(state, "step") - 2,  # the first update has moved no basis, and this one is counted already
            "exp_avg": state["basis_exp_avg"],
            "exp_avg_sq": state["basis_exp_avg_sq"],
        }
        direction = adam_direction(slope, moments, BASIS_BETAS, BASIS_EPS)
        rate = self.schedule / self.update_proj_gap
        basis.mul_(1 - rate * BASIS_WEIGHT_DECAY).sub_(direction, alpha=rate)
