"""SPAM: Adam with clipped spikes and periodic momentum resets, arXiv 2501.06842."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from megalr.errors import UserError
from megalr.rules.adam_moments import adam_state
from megalr.rules.base import Basis, Rule, Shape, State, count, tensor
from megalr.rules.checks import require_at_least
from megalr.seeding import generator

CLIP_AFTER = 20  # updates after a reset before v is trusted to tell a spike, as published
RAMP_START = 0.01  # of the updates after a reset


@dataclass(frozen=True, kw_only=True)
class SPAM(Rule):
    """Entries with g² > θ v become sign(g) √(θ v), v of the updates before; then Adam;  update = ramp · m̂ / (√v̂ + ε).

    Every ``reset_interval`` updates m and v become zero, before the update; the ramp then climbs from 0.01 to 1 as a
    cosine over ``warmup_steps``, and nothing is clipped for 20 updates. Source: arXiv 2501.06842 and its code, whose
    defaults these are. State: two moments of m x n. In a vector, or a matrix with one row, the equations are the same.

    With a density d below 1 only that share of the entries, a random choice which changes at every reset, has moments
    and is updated: state 3 d m n, moments and indices. Weight decay reaches all entries; in the code it reaches none.

    The published code leaves Adam's count through a reset, so that its bias correction takes moments that have just
    been zero for settled ones: the first update after a reset has √((1-β1)² / (1-β2)) = 3.2 times its size. Here the
    count starts again.

    Attributes:
        betas, eps: Adam's.
        threshold: θ; elements with g² > θ v are clipped. 0: clip nothing.
        reset_interval: updates between two momentum resets (ΔT); 0 for none.
        warmup_steps: length of the ramp after a reset, in updates.
        density: d, the share of the elements that have moments and are updated.
        published: follow the published code where it differs.
    """

    type_name: ClassVar[str] = "SPAM"
    name: ClassVar[str] = "spam"
    default_eps: ClassVar[float] = 1e-6
    reset_keys: ClassVar[tuple[str, ...]] = ("step", "exp_avg", "exp_avg_sq")
    takes_vectors: ClassVar[bool] = True

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    threshold: float = 5000.0
    reset_interval: int = 500
    warmup_steps: int = 150
    density: float = 1.0
    published: bool = False

    def __post_init__(self) -> None:
        require_at_least(
            0, threshold=self.threshold, reset_interval=self.reset_interval, warmup_steps=self.warmup_steps
        )
        if not 0 < self.density <= 1:
            raise UserError(f"optimizer.params.density is {self.density}; write a number in (0, 1]")

    def form(self) -> dict[str, str | int | bool]:
        # A number that is not whole stands as text, so that all forms compare alike.
        return super().form() if self.density == 1 else {**super().form(), "density": str(self.density)}

    def init_state(self, shape: Shape, device: torch.device | str = "cpu") -> State:
        if self.density == 1:
            return {"updates": 0, **adam_state(shape, device)}  # "step" counts from the last reset on
        entries = self._entries(shape)
        moments = {key: torch.zeros(entries, device=device) for key in ("exp_avg", "exp_avg_sq")}
        indices = torch.zeros(entries, dtype=torch.int32, device=device)
        return {"updates": 0, "step": 0, "refreshes": 0, **moments, "indices": indices}

    def state_numel(self, shape: Shape) -> int:
        return 2 * shape[0] * shape[1] if self.density == 1 else 3 * self._entries(shape)

    def flops(self, shape: Shape) -> float:
        return 15.0 * shape[0] * shape[1]

    def basis_keys(self, shape: Shape) -> tuple[str, ...]:
        return () if self.density == 1 else ("indices",)

    def refresh_due(self, state: State, updates: int, phase: int) -> bool:
        if self.density == 1:
            return False
        return count(state, "refreshes") == 0 or self._resets(count(state, "updates") + 1)

    def new_basis(self, grad: Tensor, state: State, *, updates: int, seed: int, name: str) -> Basis:
        drawn = torch.randperm(grad.numel(), generator=generator(seed, name, "entries", count(state, "refreshes")))
        chosen = drawn[: self._entries((grad.shape[0], grad.shape[1]))].sort().values
        return {"indices": chosen.to(torch.int32).to(grad.device)}

    def update(self, grad: Tensor, state: State, basis: Basis | None) -> Tensor:
        t = count(state, "updates") + 1
        if self._resets(t):
            self.reset(state)
        state["updates"], state["step"] = t, count(state, "step") + 1
        if self.density == 1:
            return self._direction(grad, state)
        if basis is not None:
            tensor(state, "indices").copy_(basis["indices"])
            state["refreshes"] = count(state, "refreshes") + 1
        indices = tensor(state, "indices").long()
        update = torch.zeros(grad.numel(), device=grad.device)
        update[indices] = self._direction(grad.reshape(-1)[indices], state)
        return update.view(grad.shape)

    def _direction(self, grad: Tensor, state: State) -> Tensor:
        """The update of the entries that have moments."""
        t = count(state, "updates")
        m, v = tensor(state, "exp_avg"), tensor(state, "exp_avg_sq")
        grad = self._clipped(grad, v) if self._clips(state) else grad
        m.lerp_(grad, 1 - self.betas[0])
        v.mul_(self.betas[1]).addcmul_(grad, grad, value=1 - self.betas[1])
        steps = t if self.published else count(state, "step")
        bias1, bias2 = (1 - beta**steps for beta in self.betas)
        # The code adds ε to √v before the correction of its bias, the paper to √v̂.
        root = v.sqrt().add_(self.eps).div_(math.sqrt(bias2)) if self.published else (v / bias2).sqrt_().add_(self.eps)
        return torch.div(m, root, out=root).mul_(self.ramp(t) / bias1)

    def _resets(self, t: int) -> bool:
        """Whether the t-th update starts with a reset."""
        return self.reset_interval > 0 and t % self.reset_interval == 0

    def _entries(self, shape: Shape) -> int:
        return max(1, round(self.density * shape[0] * shape[1]))

    def ramp(self, t: int) -> float:
        """The factor on the t-th update, t = 1, 2, ..."""
        if not self.reset_interval or t < self.reset_interval:
            return 1.0
        since = t % self.reset_interval
        if since >= self.warmup_steps:
            return 1.0
        return 1 - (1 - RAMP_START) * (1 + math.cos(math.pi * since / (self.warmup_steps + 1))) / 2

    def _clips(self, state: State) -> bool:
        # Against moments that have just been zero every entry is a spike, whoever has reset them.
        step, t = count(state, "step"), count(state, "updates")
        if not self.published:
            return self.threshold > 0 and step > CLIP_AFTER
        since = t % self.reset_interval if self.reset_interval else t
        return self.threshold > 0 and min(step, t, since) >= CLIP_AFTER

    def _clipped(self, grad: Tensor, v: Tensor) -> Tensor:
        limit = (v * self.threshold).sqrt_()
        return torch.clamp(grad, -limit, limit)
