"""SPAM, arXiv 2501.06842: spike-aware clipping, momentum reset and a cosine ramp after it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tests.references.common import MATRICES, Reference


class SPAM(Reference):
    """Adam's moments m, v; of a tensor of any shape. ``published`` leaves Adam's count through a reset."""

    type_name = "SPAM"
    trained_with = {**MATRICES, "lr": 3e-3, "reset_interval": 5, "warmup_steps": 3, "threshold": 4.0}
    options = {"sparse moments": {"density": 0.3}}
    short = {"reset_interval": 7, "warmup_steps": 5}
    on_factors = {"reset_interval": 12, "warmup_steps": 4, "eps": 1e-8}

    @staticmethod
    def papers_floats(m: int, n: int, r: int) -> int | None:
        return 2 * m * n

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        threshold: float = 5000.0,
        reset_interval: int = 500,
        warmup_steps: int = 150,
        density: float = 1.0,
        published: bool = False,
        permutation: Callable[[int, str, int], Tensor] | None = None,
    ) -> None:
        self.beta1, self.beta2 = betas
        self.eps = eps
        self.threshold = threshold
        self.interval, self.warmup = reset_interval, warmup_steps
        self.published = published
        self.t = 0
        self.ramp_step = warmup_steps + 1  # as if the last reset were long past
        self.m = self.v = torch.zeros(shape)
        self.since_zero = 0  # updates made with these moments
        self.density, self.permutation = density, permutation
        self.masks = 0  # drawn so far
        self.mask = torch.ones(shape, dtype=torch.bool)

    def reset(self) -> None:
        """The momentum reset, as an optimizer makes it between two updates."""
        self.m, self.v = torch.zeros_like(self.m), torch.zeros_like(self.v)
        self.since_zero = 0

    def update(self, G: Tensor) -> Tensor:
        self.t += 1
        if self.interval and self.t % self.interval == 0:
            self.reset()
            self.ramp_step = 0
        if self.density < 1 and (self.t == 1 or self.ramp_step == 0):
            self.draw_mask()
        g = G = G * self.mask  # of all others nothing is known, and nothing done with them
        if self.threshold and self.clips():
            g = torch.where(self.threshold * self.v < G**2, G.sign() * (self.threshold * self.v).sqrt(), G)
        self.since_zero += 1
        self.m = self.beta1 * self.m + (1 - self.beta1) * g
        self.v = self.beta2 * self.v + (1 - self.beta2) * g**2
        if self.published:
            step_size = math.sqrt(1 - self.beta2**self.t) / (1 - self.beta1**self.t)
            direction = step_size * self.m / (self.v.sqrt() + self.eps)
        else:
            m_hat = self.m / (1 - self.beta1**self.since_zero)
            v_hat = self.v / (1 - self.beta2**self.since_zero)
            direction = m_hat / (v_hat.sqrt() + self.eps)
        decayed = 0.0
        if self.ramp_step < self.warmup:
            decayed = 0.99 * (1 + math.cos(math.pi * self.ramp_step / (self.warmup + 1))) / 2
        self.ramp_step += 1
        return (1 - decayed) * direction

    def draw_mask(self) -> None:
        assert self.permutation is not None
        size = self.mask.numel()
        chosen = self.permutation(self.masks, "entries", size)[: max(1, round(self.density * size))]
        self.mask = torch.zeros(size, dtype=torch.bool).index_fill(0, chosen, True).view(self.mask.shape)
        self.masks += 1

    def clips(self) -> bool:
        if not self.published:
            return self.since_zero >= 20
        return self.t >= 20 and (not self.interval or self.t % self.interval >= 20)
