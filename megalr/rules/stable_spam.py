"""Stable-SPAM: Adam on gradients whose spikes are clipped and whose norm is smoothed, arXiv 2502.17055."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from megalr.errors import UserError
from megalr.ops import momentum_reset, stable_spam_adam
from megalr.rules.adam_moments import adam_state
from megalr.rules.base import Basis, Rule, Shape, State, count, tensor
from megalr.rules.checks import require_at_least, require_decay

NEGLIGIBLE = 2.0**-60  # a product of betas below this changes no fp64 bias correction


@dataclass(frozen=True, kw_only=True)
class StableSPAM(Rule):
    """AdaClip, then AdaGN, then Adam with a momentum reset every so many updates. With n = ‖G‖ after the clipping:

    - M = θ M + (1-θ) max|G|;  entries above M̂ = M / (1-θ^t) in magnitude are multiplied by M̂ / max|G|
    - a = γ1 a + (1-γ1) n,  b = γ2 b + (1-γ2) n²,  G <- G / n · â / (√b̂ + ε)
    - Adam with β1 s_t, where s_t falls from 1 to η as a cosine over ``total_steps``;  update = m̂ / (√v̂ + ε)

    Source: arXiv 2502.17055 and its code, whose defaults these are. State: two moments of m x n and the three numbers
    M, a, b. In a vector, or a matrix with one row, the equations are the same.

    Where the published code departs from its paper this rule follows the paper: a reset comes before the update that it
    is due at; M, a and b keep a count of their own, t, since they survive a reset, and would otherwise be inflated
    after each, at first by 1 / (1-θ); the bias correction of m is the product of the β1 s_t that there were; and the
    cosine stays at η once it is there. In the code γ1 is multiplied by s_t, too.

    Attributes:
        betas: Adam's.
        eps: Adam's, and AdaGN's.
        gamma1: γ1, the decay of the average gradient norm.
        gamma2: γ2, the decay of the average squared gradient norm.
        theta: θ, the decay of the average largest gradient element.
        reset_interval: updates between two momentum resets; 0 for none. The published code calls it
            ``update_proj_gap``.
        total_steps: length of the cosine in updates; write the length of the run. None leaves β1 constant.
        eta_min: η, the share of β1 at the end of the cosine.
        published: follow the published code where it differs.
    """

    type_name: ClassVar[str] = "StableSPAM"
    name: ClassVar[str] = "stable_spam"
    reset_keys: ClassVar[tuple[str, ...]] = ("step", "exp_avg", "exp_avg_sq")
    takes_vectors: ClassVar[bool] = True

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    gamma1: float = 0.7
    gamma2: float = 0.9
    theta: float = 0.999
    reset_interval: int = 1000
    total_steps: int | None = None
    eta_min: float = 0.5
    published: bool = False

    def __post_init__(self) -> None:
        require_decay(gamma1=self.gamma1, gamma2=self.gamma2, theta=self.theta)
        require_at_least(0, reset_interval=self.reset_interval)
        if self.total_steps is not None:
            require_at_least(1, total_steps=self.total_steps)
        if not 0 <= self.eta_min <= 1:
            raise UserError(f"optimizer.params.eta_min is {self.eta_min}; write a number in [0, 1]")

    def init_state(self, shape: Shape, device: torch.device | str = "cpu") -> State:
        # "updates" is t, "step" counts from the last reset on.
        return {"updates": 0, **adam_state(shape, device), "statistics": torch.zeros(3, device=device)}

    def state_numel(self, shape: Shape) -> int:
        return 2 * shape[0] * shape[1] + 3

    def flops(self, shape: Shape) -> float:
        return 20.0 * shape[0] * shape[1]

    def update(self, grad: Tensor, state: State, basis: Basis | None) -> Tensor:
        update = torch.zeros_like(grad, memory_format=torch.contiguous_format)
        self.apply(update, grad, state, basis, lr=-1.0)
        return update

    def apply(self, weight: Tensor, grad: Tensor, state: State, basis: Basis | None, *, lr: float) -> None:
        t = count(state, "updates") + 1
        resets = self.reset_interval > 0 and t % self.reset_interval == 0
        if resets and not self.published:
            self.reset(state)
        k = count(state, "step") + 1
        state["updates"], state["step"] = t, k
        beta1, beta2 = self.betas[0] * self.beta1_factor(t), self.betas[1]
        if self.published:
            # The reset replaces the moments, but this update still uses the old ones, with a count of 1.
            since = 1 if resets else k
            clip_steps, gamma1, left = k, self.gamma1 * self.beta1_factor(t), beta1**since
        else:
            since = k
            clip_steps, gamma1, left = t, self.gamma1, _product_of_beta1(self, t - k + 1, t)
        moments = tensor(state, "exp_avg"), tensor(state, "exp_avg_sq")
        stable_spam_adam(
            [weight],
            [grad.contiguous()],
            [moments[0]],
            [moments[1]],
            tensor(state, "statistics").view(1, 3),
            clip_steps=[clip_steps],
            bias1=[1 - left],
            bias2=[1 - beta2**since],
            lr=lr,
            betas=(beta1, beta2),
            eps=self.eps,
            weight_decay=0.0,
            gammas=(gamma1, self.gamma2),
            theta=self.theta,
            norm_eps=self.eps,
        )
        if resets and self.published:
            momentum_reset(moments)
            state["step"] = 1

    def beta1_factor(self, t: int) -> float:
        """s_t, of the t-th update, t = 1, 2, ..."""
        if self.total_steps is None:
            return 1.0
        period = self.total_steps + 1  # as the published code has it
        t = t if self.published else min(t, period)
        return self.eta_min + (1 - self.eta_min) * (1 + math.cos(math.pi * t / period)) / 2


@functools.lru_cache(maxsize=64)  # all matrices ask for the same
def _product_of_beta1(rule: StableSPAM, first: int, last: int) -> float:
    """Π β1 s_t over the updates from the first to the last."""
    product = 1.0
    for t in range(last, first - 1, -1):
        product *= rule.betas[0] * rule.beta1_factor(t)
        if product < NEGLIGIBLE:
            return 0.0
    return product
