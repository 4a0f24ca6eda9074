"""AdamW, arXiv 1711.05101, algorithm 2, for what is not projected."""

from __future__ import annotations

from torch import Tensor

from tests.references.common import Adam, Reference


class AdamW(Reference):
    """update = m̂ / (√v̂ + ε); of a tensor of any shape."""

    type_name = "AdamW"
    trained_with = {"lr": 3e-3, "weight_decay": 0.1, "embedding": {"lr": 1e-2}}

    def __init__(self, shape: tuple[int, ...], *, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> None:
        self.adam = Adam(betas, eps)

    def update(self, G: Tensor) -> Tensor:
        return self.adam.direction(G)
