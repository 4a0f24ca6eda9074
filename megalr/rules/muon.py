"""Muon: momentum, made orthogonal, https://kellerjordan.github.io/posts/muon/ and arXiv 2502.16982."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from megalr.errors import UserError
from megalr.rules.base import Basis, Rule, Shape, State, tensor


@dataclass(frozen=True, kw_only=True)
class Muon(Rule):
    """M = μ M + (1-μ) G,  update = c · NS((1-μ) G + μ M), with NS the Newton-Schulz iteration towards U Vᵀ.

    Source: Keller Jordan's post; names and defaults as in ``torch.optim.Muon``.

    Attributes:
        momentum: μ.
        nesterov: False takes NS(M).
        ns_coefficients: a, b, c of X <- a X + (b X Xᵀ + c (X Xᵀ)²) X.
        ns_steps: iterations.
        ns_dtype: what the iteration computes in; bfloat16 is what the original does, and fast on a GPU.
        adjust_lr_fn: "original" takes c = √max(1, m/n); "match_rms_adamw" c = 0.2 √max(m, n), which gives updates of
            AdamW's size, so that AdamW's learning rate serves (arXiv 2502.16982).
    """

    name: ClassVar[str] = "muon"

    momentum: float = 0.95
    nesterov: bool = True
    ns_coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315)
    ns_steps: int = 5
    ns_dtype: Literal["float32", "bfloat16"] = "float32"
    adjust_lr_fn: Literal["original", "match_rms_adamw"] = "original"

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise UserError(f"optimizer.params.momentum is {self.momentum}; write a number in [0, 1)")
        if self.ns_steps < 1:
            raise UserError(f"optimizer.params.ns_steps is {self.ns_steps}; write at least 1")

    def init_state(self, shape: Shape, device: torch.device | str = "cpu") -> State:
        return {"momentum_buffer": torch.zeros(shape, device=device)}

    def state_numel(self, shape: Shape) -> int:
        return shape[0] * shape[1]

    def flops(self, shape: Shape) -> float:
        short, long = sorted(shape)
        return self.ns_steps * (4.0 * short * short * long + 2.0 * short**3)

    def update(self, grad: Tensor, state: State, basis: Basis | None) -> Tensor:
        buffer = tensor(state, "momentum_buffer").lerp_(grad, 1 - self.momentum)
        direction = grad.lerp(buffer, self.momentum) if self.nesterov else buffer
        m, n = grad.shape
        factor = max(1.0, m / n) ** 0.5 if self.adjust_lr_fn == "original" else 0.2 * max(m, n) ** 0.5
        return self._orthogonalized(direction).mul_(factor)

    def _orthogonalized(self, matrix: Tensor) -> Tensor:
        """Singular values moved towards 1: into about [0.7, 1.2], for those above a few thousandths of the norm."""
        a, b, c = self.ns_coefficients
        tall = matrix.shape[0] > matrix.shape[1]
        x = matrix.T if tall else matrix
        x = (x / (x.norm() + 1e-7)).to(getattr(torch, self.ns_dtype))
        for _ in range(self.ns_steps):
            gram = x @ x.T
            x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return (x.T if tall else x).to(matrix.dtype)
