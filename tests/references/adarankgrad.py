"""AdaRankGrad, arXiv 2410.17881: GaLore with a rank that is chosen at every refresh, and never grows."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.references.galore import GaLore


class AdaRankGrad(GaLore):
    """P has as many singular vectors as explain a share η of ‖G‖²; moments move into the new, smaller space."""

    type_name = "AdaRankGrad"
    trained_with = {**GaLore.trained_with, "energy": 0.8}
    short = {"rank": 6, "update_proj_gap": 6, "energy": 0.9}

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        energy: float = 0.99,
        projector: str = "svd",
        moments: str = "transport",
        **options,
    ) -> None:
        super().__init__(shape, projector=projector, moments=moments, **options)
        self.energy = energy

    def refresh(self, G: Tensor) -> None:
        super().refresh(G)
        if self.refreshes > 1 and self.moments == "keep":
            kept = self.P.shape[1]
            self.adam.m, self.adam.v = self.adam.m[:kept], self.adam.v[:kept]

    def basis(self, G: Tensor, side: str) -> Tensor:
        # Vectors that are gone have no sign to agree with: those before the rank fell are not looked at again.
        before = None if self.P is None else torch.nn.functional.pad(self.P, (0, self.full_rank - self.P.shape[1]))
        if before is None:
            self.full_rank = self.rank
        self.rank = self.full_rank
        P = super().basis(G, side) if before is None else self.signed(G, before)
        kept = 1 if G.any() else P.shape[1]
        while kept < P.shape[1] and (P[:, :kept].T @ G).square().sum() < self.energy * G.square().sum():
            kept += 1
        return P[:, : kept if self.P is None else min(kept, self.P.shape[1])]

    def signed(self, G: Tensor, before: Tensor) -> Tensor:
        U = torch.linalg.svd(G, full_matrices=False)[0][:, : self.full_rank]
        return U * torch.where((U * before).sum(0) < 0, -1.0, 1.0).to(G.dtype)
