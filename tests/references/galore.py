"""GaLore, arXiv 2403.03507, algorithm 2, with choices of what the moments become at a refresh."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.references.common import Adam, Draw, Projected, leading_singular_vectors, orthonormal


class GaLore(Projected):
    """R = Pᵀ G, N = Adam(R), update = α P N; with proj_type "full" R = Pᵀ G Q and update = α P N Qᵀ."""

    type_name = "GaLoreAdamW"
    options = {
        "reverse_std": {"proj_type": "reverse_std"},
        "full": {"proj_type": "full"},
        "moments reset": {"moments": "reset"},
        "random bases": {"projector": "random"},
        "no stagger": {"stagger": False},
    }

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        rank: int = 128,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        proj_type: str = "std",
        projector: str = "svd",
        moments: str = "keep",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        phase: int = 0,
        draw: Draw | None = None,
    ) -> None:
        super().__init__(shape, rank=rank, proj_type=proj_type, update_proj_gap=update_proj_gap, phase=phase, draw=draw)
        if projector not in ("svd", "random"):
            raise NotImplementedError(f"there is no reference of the projector {projector!r}")
        self.scale = scale
        self.projector = projector
        self.moments = moments
        self.adam = Adam(betas, eps)
        self.Q: Tensor | None = None

    def left_update(self, G: Tensor) -> Tensor:
        if self.refresh_due(self.updates):
            self.refresh(G)
        R = self.P.T @ G @ self.Q if self.full else self.P.T @ G
        N = self.adam.direction(R)
        return self.scale * (self.P @ N @ self.Q.T if self.full else self.P @ N)

    def projector_at(self, updates: int) -> str:
        return self.projector

    def basis(self, G: Tensor, side: str) -> Tensor:
        if self.projector_at(self.updates) == "random":
            return orthonormal(self.gaussian(side, G))
        return leading_singular_vectors(G, self.rank, self.P if side == self.side else self.Q)

    def refresh(self, G: Tensor) -> None:
        P = self.basis(G, self.side)
        Q = self.basis(G.T, "right") if self.full else None
        if self.refreshes and self.moments == "reset":
            self.adam.reset()
        if self.refreshes and self.moments in ("transport", "transport_first"):
            # The coordinates in the new basis of what the old coordinates stand for; for v with squared entries.
            left = P.T @ self.P
            right = self.Q.T @ Q if self.full else torch.eye(G.shape[1], dtype=G.dtype)
            self.adam.m = left @ self.adam.m @ right
            if self.moments == "transport":
                self.adam.v = left**2 @ self.adam.v @ right**2
        self.P, self.Q = P, Q
        self.refreshes += 1
