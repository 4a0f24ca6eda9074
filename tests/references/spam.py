"""SPAM, arXiv 2501.06842: spike-aware clipping, momentum reset and a cosine ramp after it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tests.references.common import Reference


class SPAM(Reference):
    """Adam's moments m, v; of a tensor of any shape. ``published`` leaves Adam's count through a reset."""

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        threshold: float = 5000.0,
        reset_interval: int = 500,
        warmup_steps: int = 150,
        published: bool = False,
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

    def reset(self) -> None:
        """The momentum reset, as an optimizer makes it between two updates."""
        self.m, self.v = torch.zeros_like(self.m), torch.zeros_like(self.v)
        self.since_zero = 0

    def update(self, G: Tensor) -> Tensor:
        self.t += 1
        if self.interval and self.t % self.interval == 0:
            self.reset()
            self.ramp_step = 0
        g = G
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

    def clips(self) -> bool:
        if not self.published:
            return self.since_zero >= 20
        return self.t >= 20 and (not self.interval or self.t % self.interval >= 20)
