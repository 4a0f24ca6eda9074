"""CAME, arXiv 2307.02047, algorithm 2."""

from __future__ import annotations

from torch import Tensor

from tests.references.common import MATRICES, Reference


class FactoredAverage:
    """The moving averages of a matrix's row and column means, and the rank-one matrix that they stand for."""

    def __init__(self, beta: float) -> None:
        self.beta = beta
        self.r: Tensor | float = 0.0
        self.c: Tensor | float = 0.0

    def __call__(self, X: Tensor) -> Tensor:
        self.r = self.beta * self.r + (1 - self.beta) * X.mean(dim=1)
        self.c = self.beta * self.c + (1 - self.beta) * X.mean(dim=0)
        return self.r[:, None] * self.c[None, :] / self.r.mean()


class CAME(Reference):
    """U = G / √V, clipped; M of U; update = M / √S with S the factored average of (U - M)²."""

    type_name = "CAME"
    trained_with = {**MATRICES, "lr": 3e-3}
    # Nothing is corrected for bias: the updates after a reset are tenfold, and at AdamW's rate the run is chaotic.
    on_factors = {"lr": 1e-4}

    @staticmethod
    def papers_floats(m: int, n: int, r: int) -> int | None:
        return m * n + 2 * (m + n)

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        beta3: float = 0.9999,
        eps1: float = 1e-30,
        eps2: float = 1e-16,
        clip_threshold: float = 1.0,
    ) -> None:
        self.beta1, self.beta2 = betas
        self.beta3 = beta3
        self.eps1, self.eps2 = eps1, eps2
        self.d = clip_threshold
        self.reset()

    def reset(self) -> None:
        self.V = FactoredAverage(self.beta2)
        self.S = FactoredAverage(self.beta3)
        self.M: Tensor | float = 0.0

    def update(self, G: Tensor) -> Tensor:
        U = G / self.V(G**2 + self.eps1).sqrt()
        rms = U.square().mean().sqrt()
        U = U / max(1.0, rms / self.d)
        self.M = self.beta1 * self.M + (1 - self.beta1) * U
        return self.M / self.S((U - self.M) ** 2 + self.eps2).sqrt()
