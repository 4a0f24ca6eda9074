"""Fira, arXiv 2410.01623, algorithm 1, with the remainder of the published code."""

from __future__ import annotations

from torch import Tensor

from tests.references.common import NormGrowthLimiter
from tests.references.galore import GaLore


class Fira(GaLore):
    """update = α P N + S, with S = φ (G - α P R), φ_j = ‖N_:,j‖ / ‖R_:,j‖, and ‖S‖ growing by at most 1 % a step."""

    type_name = "FiraAdamW"
    options = {"left": {"proj_type": "left"}, "moments transported": {"moments": "transport"}}

    def __init__(self, shape: tuple[int, int], **options) -> None:
        super().__init__(shape, **options)
        self.limit = NormGrowthLimiter()

    def left_update(self, G: Tensor) -> Tensor:
        if self.refresh_due(self.updates):
            self.refresh(G)
        R = self.P.T @ G
        N = self.adam.direction(R)
        phi = N.norm(dim=0) / (R.norm(dim=0) + 1e-8)  # one a column
        S = self.limit(phi * (G - self.scale * self.P @ R))
        return self.scale * self.P @ N + S
