"""APOLLO and APOLLO-Mini, arXiv 2412.05270, algorithm 1."""

from __future__ import annotations

import math

from torch import Tensor

from tests.references.common import MATRICES, Adam, Draw, NormGrowthLimiter, Projected


class Apollo(Projected):
    """R = Pᵀ G with P Gaussian of variance 1/r, N = Adam(R), update = √α s G, with s = ‖N‖ / ‖R‖.

    s is taken over each column of R ("channel") or over the whole matrix ("tensor"). The limiter sees s G as it is
    without the scale and the bias correction of N's two moments.
    """

    type_name = "APOLLO"
    options = {"right": {"proj_type": "right"}}

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        rank: int = 128,
        update_proj_gap: int = 200,
        scale: float = 1.0,
        scale_type: str = "channel",
        proj_type: str = "std",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        phase: int = 0,
        draw: Draw | None = None,
    ) -> None:
        super().__init__(shape, rank=rank, proj_type=proj_type, update_proj_gap=update_proj_gap, phase=phase, draw=draw)
        self.scale = scale
        self.scale_type = scale_type
        self.adam = Adam(betas, eps)
        self.limit = NormGrowthLimiter()

    def left_update(self, G: Tensor) -> Tensor:
        if self.refresh_due(self.updates):
            self.P = self.gaussian(self.side, G) / math.sqrt(self.rank)
            self.refreshes += 1
        R = self.P.T @ G
        N = self.adam.direction(R)
        axis = 0 if self.scale_type == "channel" else (0, 1)
        s = N.norm(dim=axis) / (R.norm(dim=axis) + 1e-8)
        c = math.sqrt(1 - self.adam.beta2**self.adam.t) / (1 - self.adam.beta1**self.adam.t)
        return math.sqrt(self.scale) * c * self.limit(s * G / c)


class ApolloMini(Apollo):
    """Rank 1, one s a matrix, and α = 128."""

    type_name = "APOLLOMini"
    trained_with = {**MATRICES, "update_proj_gap": 5, "lr": 1e-3}
    short = {"update_proj_gap": 6}

    @staticmethod
    def papers_floats(m: int, n: int, r: int) -> int | None:
        return m + 2 * n

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        rank: int = 1,
        scale: float = 128.0,
        scale_type: str = "tensor",
        **options,
    ) -> None:
        super().__init__(shape, rank=rank, scale=scale, scale_type=scale_type, **options)
