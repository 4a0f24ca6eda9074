"""Fira: GaLore plus what it leaves out of the gradient, scaled like what it keeps, arXiv 2410.01623."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from megalr.errors import UserError
from megalr.rules.adam_moments import adam_direction
from megalr.rules.base import Basis, Shape, State
from megalr.rules.galore import GaLore
from megalr.rules.projected import factors_back, limit_growth, project

GROWTH_LIMIT = 1.01  # γ of the norm-growth limiter


@dataclass(frozen=True, kw_only=True)
class Fira(GaLore):
    """R = Pᵀ G,  N = Adam(R),  update = α P N + S,  S = φ (G - α P R) limited in growth,  φ_j = ‖N_j‖ / ‖R_j‖.

    j runs over R's columns for a left basis, over its rows for a right one. S's norm grows by at most 1 % from one
    update to the next. Source: arXiv 2410.01623. As in the published code, the remainder subtracts α P R rather than
    P R, and 1e-8 is added to ‖R_j‖: with Adam's ε in N, φ depends on the gradient's scale in any case. N is
    bias-corrected here before the limiter sees it, as the paper's Adam is; the code corrects after it, which differs
    in the first updates.
    """

    type_name: ClassVar[str] = "FiraAdamW"
    name: ClassVar[str] = "fira"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.proj_type == "full":
            raise UserError('optimizer.params.proj_type is "full", which Fira does not define; write "std"')

    def init_state(self, shape: Shape, device: torch.device | str = "cpu") -> State:
        return {**super().init_state(shape, device), "norm": torch.zeros((), device=device)}

    def state_numel(self, shape: Shape) -> int:
        return super().state_numel(shape) + 1

    def flops(self, shape: Shape) -> float:
        return super().flops(shape) + 2.0 * shape[0] * shape[1] * self.rank_of(shape)

    def update(self, grad: Tensor, state: State, basis: Basis | None) -> Tensor:
        rest, direction = self._parts(grad, state, basis)
        return rest.addmm_(*factors_back(direction, state))

    def apply(self, weight: Tensor, grad: Tensor, state: State, basis: Basis | None, *, lr: float) -> None:
        rest, direction = self._parts(grad, state, basis)
        weight.add_(rest, alpha=-lr).addmm_(*factors_back(direction, state), alpha=-lr)

    def _parts(self, grad: Tensor, state: State, basis: Basis | None) -> tuple[Tensor, Tensor]:
        """S, (m, n), and α N, of R's shape."""
        self.adopt(state, basis)
        low = project(grad, state)
        direction = adam_direction(low, state, self.betas, self.eps)
        axis = 0 if "left" in state else 1
        ratio = direction.norm(dim=axis, keepdim=True) / (low.norm(dim=axis, keepdim=True) + 1e-8)  # φ
        rest = torch.addmm(grad, *factors_back(low, state), alpha=-self.scale).mul_(ratio)
        return limit_growth(rest, state, GROWTH_LIMIT), direction.mul_(self.scale)
