"""SCALE, arXiv 2506.16659, with the root mean square of its published code."""

from __future__ import annotations

from torch import Tensor

from tests.references.common import MATRICES, Reference


class SCALE(Reference):
    """Each output's gradients divided by their root mean square; of the head those of the momentum.

    W is (out, in), an embedding (vocabulary, out).
    """

    type_name = "SCALE"
    trained_with = {**MATRICES, "lr": 1e-3, "embedding": {"lr": 3e-3}, "head": True, "embeddings": True}
    on_factors = {}

    def __init__(self, shape: tuple[int, int], *, momentum: float = 0.9, part: str = "matrix") -> None:
        self.mu = momentum
        self.part = part
        self.M: Tensor | float = 0.0

    def reset(self) -> None:
        self.M = 0.0

    def update(self, G: Tensor) -> Tensor:
        if self.part == "head":
            self.M = self.mu * self.M + (1 - self.mu) * G
            G = self.M
        columns = G if self.part == "embedding" else G.T
        rms = columns.square().mean(0).sqrt()
        rms[rms == 0] = 1.0
        return columns / rms if self.part == "embedding" else (columns / rms).T
