"""Adam-mini, arXiv 2406.16793, algorithm 1, with the rows of a matrix as blocks."""

from __future__ import annotations

from torch import Tensor

from tests.references.common import MATRICES, Reference


class AdamMini(Reference):
    """Adam whose second moment is one number for each row, the mean over it."""

    type_name = "AdamMini"
    trained_with = {**MATRICES, "lr": 3e-3}
    on_factors = {}

    def __init__(self, shape: tuple[int, int], *, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> None:
        self.beta1, self.beta2 = betas
        self.eps = eps
        self.reset()

    def reset(self) -> None:
        self.t = 0
        self.m: Tensor | float = 0.0
        self.v: list[Tensor | float] | None = None

    def update(self, G: Tensor) -> Tensor:
        self.t += 1
        update = G.clone()
        if self.v is None:
            self.v = [0.0] * len(G)
        self.m = self.beta1 * self.m + (1 - self.beta1) * G
        for i, row in enumerate(G):
            self.v[i] = self.beta2 * self.v[i] + (1 - self.beta2) * (row * row).mean()
            v_hat = self.v[i] / (1 - self.beta2**self.t)
            update[i] = self.m[i] / (1 - self.beta1**self.t) / (v_hat.sqrt() + self.eps)
        return update
