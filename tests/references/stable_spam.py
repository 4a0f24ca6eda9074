"""Stable-SPAM, arXiv 2502.17055: AdaClip, AdaGN and momentum reset; and what its published code makes of it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tests.references.common import MATRICES, Reference


class StableSPAM(Reference):
    """Statistics M of the largest entry and a, b of the norm, and Adam's moments m, v; of a tensor of any shape."""

    type_name = "StableSPAM"
    trained_with = {**MATRICES, "lr": 3e-3, "reset_interval": 5, "total_steps": 9}
    options = {"published": {"published": True}}
    short = {"reset_interval": 7, "total_steps": 15}
    on_factors = {"reset_interval": 12, "total_steps": 15}

    @staticmethod
    def papers_floats(m: int, n: int, r: int) -> int | None:
        return 2 * m * n + 3

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        gamma1: float = 0.7,
        gamma2: float = 0.9,
        theta: float = 0.999,
        reset_interval: int = 1000,
        total_steps: int | None = None,
        eta_min: float = 0.5,
        published: bool = False,
    ) -> None:
        self.beta1, self.beta2 = betas
        self.eps = eps
        self.gamma1, self.gamma2, self.theta = gamma1, gamma2, theta
        self.interval = reset_interval
        self.total, self.eta = total_steps, eta_min
        self.published = published
        self.t = 0  # updates
        self.k = 0  # of the published code: what it calls "step"
        self.M = self.a = self.b = 0.0
        self.reset()

    def reset(self) -> None:
        """The momentum reset, as an optimizer makes it between two updates."""
        self.m: Tensor | float = 0.0
        self.v: Tensor | float = 0.0
        self.products = [1.0, 1.0]  # of the β1 and the β2 since m and v were zero
        self.k = 0

    def s(self, t: int) -> float:
        if self.total is None:
            return 1.0
        progress = t / (self.total + 1)
        if not self.published:
            progress = min(progress, 1.0)
        return self.eta + (1 - self.eta) * (1 + math.cos(math.pi * progress)) / 2

    def update(self, G: Tensor) -> Tensor:
        return self.published_update(G) if self.published else self.paper_update(G)

    def stabilized(self, G: Tensor, count: int, gamma1: float) -> Tensor:
        # AdaClip
        largest = G.abs().max().item()
        self.M = self.theta * self.M + (1 - self.theta) * largest
        M_hat = self.M / (1 - self.theta**count)
        if largest > 0:
            G = torch.where(G.abs() > M_hat, G / largest * M_hat, G)
        # AdaGN
        norm = G.norm().item()
        self.a = gamma1 * self.a + (1 - gamma1) * norm
        self.b = self.gamma2 * self.b + (1 - self.gamma2) * norm**2
        a_hat, b_hat = self.a / (1 - gamma1**count), self.b / (1 - self.gamma2**count)
        return G / norm * a_hat / (math.sqrt(b_hat) + self.eps) if norm > 0 else G

    def paper_update(self, G: Tensor) -> Tensor:
        self.t += 1
        if self.interval and self.t % self.interval == 0:
            self.reset()
        g = self.stabilized(G, self.t, self.gamma1)
        beta1 = self.beta1 * self.s(self.t)
        self.m = beta1 * self.m + (1 - beta1) * g
        self.v = self.beta2 * self.v + (1 - self.beta2) * g**2
        self.products = [self.products[0] * beta1, self.products[1] * self.beta2]
        m_hat, v_hat = self.m / (1 - self.products[0]), self.v / (1 - self.products[1])
        return m_hat / (v_hat.sqrt() + self.eps)

    def published_update(self, G: Tensor) -> Tensor:
        """Line for line what the code does, whatever one may think of it."""
        self.t += 1
        self.k += 1
        scale = self.s(self.t)
        g = self.stabilized(G, self.k, self.gamma1 * scale)
        m, v = self.m, self.v  # bound before the reset
        reset = self.interval and self.t % self.interval == 0
        if reset:
            self.k = 1
        beta1 = self.beta1 * scale
        m = beta1 * m + (1 - beta1) * g
        v = self.beta2 * v + (1 - self.beta2) * g**2
        self.m, self.v = (0.0, 0.0) if reset else (m, v)
        denominator = v.sqrt() / math.sqrt(1 - self.beta2**self.k) + self.eps
        return m / denominator / (1 - beta1**self.k)
