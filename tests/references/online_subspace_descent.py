"""Online Subspace Descent, arXiv 2408.12857: GaLore with a basis that descends the loss of an online PCA."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.references.common import MATRICES, Adam
from tests.references.galore import GaLore


class OnlineSubspaceDescent(GaLore):
    """After GaLore's update, one AdamW step of P on ‖P Pᵀ Ĝ - Ĝ‖² with Ĝ = G / ‖G‖, from the second update on.

    Its learning rate is 1 / gap times that of the weights over its initial value, or 1 / gap.
    Where P is square there is nothing to descend: the loss is zero, and its gradient rounding.
    """

    type_name = "OnlineSubspaceDescent"
    trained_with = {**MATRICES, "rank": 5, "update_proj_gap": 50}
    options = {"basis at a constant rate": {"basis_lr": "constant", "update_proj_gap": 25}}

    @staticmethod
    def papers_floats(m: int, n: int, r: int) -> int | None:
        return m * r + 2 * n * r + 2 * m * r  # the basis has moments of its own

    def __init__(self, shape: tuple[int, int], *, basis_lr: str = "scheduled", **options) -> None:
        super().__init__(shape, **options)
        self.basis_lr = basis_lr
        self.initial_lr: float | None = None
        self.ratio = 1.0
        self.basis_adam = Adam(betas=(0.9, 0.999), eps=1e-8)  # torch.optim.AdamW's defaults, as is the decay below

    def refresh_due(self, step: int) -> bool:
        return step == 0

    def step(self, W: Tensor, G: Tensor, lr: float, weight_decay: float = 0.0) -> None:
        if self.initial_lr is None:
            self.initial_lr = lr
        self.ratio = lr / self.initial_lr if self.basis_lr == "scheduled" else 1.0
        super().step(W, G, lr, weight_decay)

    def left_update(self, G: Tensor) -> Tensor:
        update = super().left_update(G)
        if self.updates > 0 and self.P.shape[0] > self.P.shape[1]:
            slope = self.slope(self.P, G / G.norm() if G.any() else G)
            rate = self.ratio / self.gap
            self.P = self.P - rate * (self.basis_adam.direction(slope) + 0.01 * self.P)
        return update

    @staticmethod
    def slope(P: Tensor, G: Tensor) -> Tensor:
        """d/dP ‖P Pᵀ G - G‖²."""
        with torch.enable_grad():
            P = P.detach().clone().requires_grad_()
            loss = (P @ P.T @ G - G).square().sum()
            return torch.autograd.grad(loss, P)[0]
