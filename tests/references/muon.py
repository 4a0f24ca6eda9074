"""Muon, https://kellerjordan.github.io/posts/muon/, with the factors of ``torch.optim.Muon``."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tests.references.common import Reference


class Muon(Reference):
    """M = μ M + (1-μ) G, update = c NewtonSchulz((1-μ) G + μ M), or c NewtonSchulz(M) without Nesterov."""

    type_name = "Muon"
    options = {"at AdamW's rate": {"adjust_lr_fn": "match_rms_adamw", "nesterov": False}}
    on_factors = {}

    @staticmethod
    def papers_floats(m: int, n: int, r: int) -> int | None:
        return m * n

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315),
        ns_steps: int = 5,
        ns_dtype: str = "float32",
        adjust_lr_fn: str = "original",
    ) -> None:
        m, n = shape
        self.factor = {
            "original": math.sqrt(max(1.0, m / n)),
            "match_rms_adamw": 0.2 * math.sqrt(max(m, n)),
        }[adjust_lr_fn]
        self.mu = momentum
        self.nesterov = nesterov
        self.coefficients = ns_coefficients
        self.ns_steps = ns_steps
        self.ns_dtype = ns_dtype
        self.reset()

    def reset(self) -> None:
        self.M: Tensor | float = 0.0

    def update(self, G: Tensor) -> Tensor:
        self.M = self.mu * self.M + (1 - self.mu) * G
        direction = (1 - self.mu) * G + self.mu * self.M if self.nesterov else self.M
        return self.factor * self.newton_schulz(direction)

    def newton_schulz(self, direction: Tensor) -> Tensor:
        """The quintic iteration on the singular values, s <- a s + b s³ + c s⁵, from s / ‖s‖."""
        a, b, c = self.coefficients
        X = direction / direction.norm() if direction.any() else direction
        if self.ns_dtype == "bfloat16":
            X = X.to(torch.bfloat16)
        if X.shape[0] > X.shape[1]:
            X = X.T
        for _ in range(self.ns_steps):
            A = X @ X.T
            X = a * X + (b * A + c * A @ A) @ X
        if direction.shape[0] > direction.shape[1]:
            X = X.T
        return X.to(direction.dtype)
