"""FRUGAL, arXiv 2411.07837, algorithm 1, with Adam as the state-full and signSGD as the state-free part."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tests.references.common import MATRICES, Draw, Reference
from tests.references.galore import GaLore


class FRUGAL(Reference):
    """Adam on some columns of G, or in a subspace as GaLore's; the signs of what is left."""

    type_name = "FRUGAL"
    trained_with = {**MATRICES, "update_proj_gap": 5, "lr": 3e-3}
    # The signs count little: of what is nearly zero they turn with the order of a sum.
    options = {"a basis and the signs of the rest": {"projector": "svd", "density": 0.4, "state_free_scale": 0.01}}
    short = {"update_proj_gap": 6}
    dtypes = frozenset({torch.float32, torch.int32})

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        density: float = 0.25,
        update_proj_gap: int = 200,
        projector: str = "columns",
        state_free_scale: float = 1.0,
        moments: str = "reset",
        proj_type: str = "std",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        phase: int = 0,
        draw: Draw | None = None,
        permutation: Callable[[int, str, int], Tensor] | None = None,
    ) -> None:
        self.columns = projector == "columns"
        # Of columns the share is truncated; of a side's dimensions, which are the basis's, it is rounded.
        m, n = shape
        size = {"std": min(m, n), "reverse_std": max(m, n), "left": m, "right": n}[proj_type]
        self.k = max(1, int(density * n) if self.columns else round(density * size))
        self.sigma = state_free_scale
        self.permutation = permutation
        # GaLore with α = 1: of columns it lends the schedule and Adam, and P is a part of the identity.
        self.full = GaLore(
            shape,
            rank=self.k,
            update_proj_gap=update_proj_gap,
            scale=1.0,
            proj_type="right" if self.columns else proj_type,
            projector="svd" if self.columns else projector,
            moments=moments,
            betas=betas,
            eps=eps,
            phase=phase,
            draw=draw,
        )
        if self.columns:
            self.full.rank = self.k
            self.full.basis = self.chosen

    def chosen(self, G: Tensor, side: str) -> Tensor:
        """Columns of the identity, (n, k), for G transposed."""
        assert self.permutation is not None
        n = G.shape[0]
        indices = self.permutation(self.full.refreshes, "columns", n)[: self.k].sort().values
        return torch.eye(n, dtype=G.dtype)[:, indices]

    def update(self, G: Tensor) -> Tensor:
        update = self.full.update(G)
        P = self.full.P
        kept = G @ P @ P.T if self.full.side == "right" else P @ P.T @ G
        if self.columns:
            active = P.sum(dim=1) > 0
            return torch.where(active, update, self.sigma * G.sign())
        return update + self.sigma * (G - kept).sign()
