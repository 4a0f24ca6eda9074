"""LDAdam: Adam in a subspace that turns a little with every update, with error feedback, arXiv 2410.16103."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from megalr.errors import UserError
from megalr.rules.adam_moments import adam_direction
from megalr.rules.base import Basis, Shape, State, count, tensor
from megalr.rules.bases import Projector, Side, power_step
from megalr.rules.projected import ProjectedRule, project, project_back


@dataclass(frozen=True, kw_only=True)
class LDAdam(ProjectedRule):
    """One step of subspace iteration an update, projection-aware moments, and what was cut off fed back.

    With A = G + E (E the error so far), the left side, and hats for bias correction:

    - B = ρ P m̂ + (1-ρ) A,  P' = QR(B Bᵀ P),  R = P'ᵀ A,  C = P'ᵀ P
    - m = C m,  v = (1-β2^(t-1)) |C² (v̂ - m̂²) + (C m̂)²|, then Adam with R; update = P' N
    - E = A - P' R + β1/(1-β1) (P m_old - P' C m_old)

    The first basis holds the leading singular vectors of G. Source: arXiv 2410.16103, algorithm 1. The published code
    keeps E in ``.grad``, which sharded gradients cannot; here it is state, m x n. "std" and "reverse_std" project a
    square matrix on its left side, as the code does. A state keeps the side that it was made with.

    Attributes:
        rho: ρ, the weight of the momentum in the matrix whose subspace is tracked.
        error_feedback: keep the error E of the projection and add it to the next gradient.
    """

    type_name: ClassVar[str] = "LDAdamW"
    name: ClassVar[str] = "ldadam"
    unused: ClassVar[frozenset[str]] = frozenset({"projector", "moments", "update_proj_gap", "stagger"})

    rank: int = 16
    rho: float = 0.908
    betas: tuple[float, float] = (0.908, 0.99)
    eps: float = 1e-8
    error_feedback: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.rho < 1:
            raise UserError(f"optimizer.params.rho is {self.rho}; write a number in [0, 1)")
        if self.proj_type == "full":
            raise UserError('optimizer.params.proj_type is "full", which LDAdam does not define; write "std"')

    def form(self) -> dict[str, str | int | bool]:
        return {**super().form(), "error_feedback": self.error_feedback}

    def sides(self, shape: Shape) -> tuple[Side, ...]:
        square = shape[0] == shape[1] and self.proj_type in ("std", "reverse_std")
        return ("left",) if square else super().sides(shape)

    def basis_keys_of(self, state: State, shape: Shape) -> tuple[str, ...]:
        return (_side(state),)

    def room(self, numbers: Mapping[str, float], shape: Shape, device: torch.device | str) -> State:
        # States without a version are of a time when square matrices were projected on the right.
        square = shape[0] == shape[1] and self.proj_type == "std" and "version" not in numbers
        state = (replace(self, proj_type="right") if square else self).init_state(shape, device)
        del state["version"]  # as the numbers have it
        return state | dict(numbers)

    def init_state(self, shape: Shape, device: torch.device | str = "cpu") -> State:
        state = {"version": 2, **super().init_state(shape, device)}
        if self.error_feedback:
            state["error"] = torch.zeros(shape, device=device)
        return state

    def state_numel(self, shape: Shape) -> int:
        return super().state_numel(shape) + self.error_feedback * shape[0] * shape[1]

    def flops(self, shape: Shape) -> float:
        return 14.0 * shape[0] * shape[1] * self.rank_of(shape)

    def projector_at(self, updates: int) -> Projector:
        return "svd"  # of the first basis

    def refresh_due(self, state: State, updates: int, phase: int) -> bool:
        return True

    def new_basis(self, grad: Tensor, state: State, *, updates: int, seed: int, name: str) -> Basis:
        if not count(state, "refreshes"):
            return super().new_basis(grad, state, updates=updates, seed=seed, name=name)
        side = _side(state)
        tracked = self._corrected(grad, state).mul_(1 - self.rho)
        correction = 1 - self.betas[0] ** count(state, "step")
        tracked.add_(project_back(tensor(state, "exp_avg"), state), alpha=self.rho / correction)  # B
        return {side: power_step(tracked if side == "left" else tracked.T, tensor(state, side))}

    def update(self, grad: Tensor, state: State, basis: Basis | None) -> Tensor:
        assert basis is not None
        side = _side(state)
        corrected = self._corrected(grad, state)  # A
        old_momentum = project_back(tensor(state, "exp_avg"), state) if self.error_feedback else None
        if count(state, "refreshes"):
            self._turn_moments(state, basis[side].T @ tensor(state, side), left=side == "left")
        tensor(state, side).copy_(basis[side])
        state["refreshes"] = count(state, "refreshes") + 1
        low = project(corrected, state)  # R
        if old_momentum is not None:
            lost = old_momentum.sub_(project_back(tensor(state, "exp_avg"), state))
            error = corrected - project_back(low, state)
            tensor(state, "error").copy_(error.add_(lost, alpha=self.betas[0] / (1 - self.betas[0])))
        return project_back(adam_direction(low, state, self.betas, self.eps), state)

    def _corrected(self, grad: Tensor, state: State) -> Tensor:
        return grad + tensor(state, "error") if self.error_feedback else grad.clone()

    def _turn_moments(self, state: State, turn: Tensor, *, left: bool) -> None:
        """m and v in the new basis; v as the second moment of a variable whose coordinates are uncorrelated."""
        step = count(state, "step")
        m, v = tensor(state, "exp_avg"), tensor(state, "exp_avg_sq")
        corrections = 1 - self.betas[0] ** step, 1 - self.betas[1] ** step
        mean, square = m / corrections[0], v / corrections[1]

        def turned(matrix: Tensor, by: Tensor) -> Tensor:
            return by @ matrix if left else matrix @ by.T

        variance = turned(square - mean.square(), turn.square())
        v.copy_((variance + turned(mean, turn).square()).abs_().mul_(corrections[1]))
        m.copy_(turned(m, turn))


def _side(state: State) -> Side:
    return "left" if "left" in state else "right"
