"""CAME: Adam with a factored second moment, and smaller steps where updates are unstable, arXiv 2307.02047."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from megalr.rules.base import Basis, Rule, Shape, State, tensor
from megalr.rules.checks import require_decay, require_positive


@dataclass(frozen=True, kw_only=True)
class CAME(Rule):
    """With F(X) the rank-one estimate of a matrix of positive entries from the averages of its rows and its columns:

    - V = β2 V + (1-β2) (G² + ε1),  U = G / √F(V), scaled down to a root mean square of at most d
    - M = β1 M + (1-β1) U
    - S = β3 S + (1-β3) ((U - M)² + ε2), the instability;  update = M / √F(S)

    Source: arXiv 2307.02047, algorithm 2, and its code, whose defaults these are; as there, nothing is corrected for
    bias. State: M of m x n; of V and S the means of rows and columns only, which are averaged themselves: 2 (m + n).

    Attributes:
        betas: β1 of the momentum, β2 of the squared gradients.
        beta3: β3, the decay of the average instability.
        eps1: ε1, added to squared gradients.
        eps2: ε2, added to squared residuals.
        clip_threshold: d, the largest root mean square of U.
    """

    type_name: ClassVar[str] = "CAME"
    name: ClassVar[str] = "came"
    reset_keys: ClassVar[tuple[str, ...]] = (
        "exp_avg",
        "exp_avg_sq_row",
        "exp_avg_sq_col",
        "exp_avg_res_row",
        "exp_avg_res_col",
    )

    betas: tuple[float, float] = (0.9, 0.999)
    beta3: float = 0.9999
    eps1: float = 1e-30
    eps2: float = 1e-16
    clip_threshold: float = 1.0

    def __post_init__(self) -> None:
        require_decay(beta3=self.beta3)
        require_positive(eps1=self.eps1, eps2=self.eps2, clip_threshold=self.clip_threshold)

    def init_state(self, shape: Shape, device: torch.device | str = "cpu") -> State:
        m, n = shape
        sizes = {"exp_avg_sq_row": m, "exp_avg_sq_col": n, "exp_avg_res_row": m, "exp_avg_res_col": n}
        factors = {key: torch.zeros(size, device=device) for key, size in sizes.items()}
        return {"exp_avg": torch.zeros(shape, device=device), **factors}

    def state_numel(self, shape: Shape) -> int:
        return shape[0] * shape[1] + 2 * (shape[0] + shape[1])

    def flops(self, shape: Shape) -> float:
        return 20.0 * shape[0] * shape[1]

    def update(self, grad: Tensor, state: State, basis: Basis | None) -> Tensor:
        update = _scale(state, "exp_avg_sq", grad.square().add_(self.eps1), self.betas[1]).mul_(grad)
        rms = update.norm() / update.numel() ** 0.5
        update.div_((rms / self.clip_threshold).clamp_(min=1.0))
        m = tensor(state, "exp_avg").lerp_(update, 1 - self.betas[0])
        return _scale(state, "exp_avg_res", update.sub_(m).square_().add_(self.eps2), self.beta3).mul_(m)


def _scale(state: State, key: str, squares: Tensor, beta: float) -> Tensor:
    """1 / √F of the averaged squares, (m, n); their rows' and columns' means in the state take these in."""
    row = tensor(state, f"{key}_row").lerp_(squares.mean(1), 1 - beta)  # (m,)
    col = tensor(state, f"{key}_col").lerp_(squares.mean(0), 1 - beta)  # (n,)
    # A row that is zero beside others that are not must not become infinite where tiny numbers are flushed to zero.
    share = (row / row.mean()).clamp_(min=torch.finfo(row.dtype).tiny)
    return torch.outer(share.rsqrt_(), col.rsqrt())
