"""One plain PyTorch process that trains a low-rank model as the paper writes it; no DeepSpeed, nothing of megalr.optim.

Written to be read against the equations, not to be fast: AdamW is spelled out, and refactorization decomposes the
m x n product itself, in fp64. Another rule on the factors comes from tests/references/.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.references import reference_for


@dataclass
class Recipe:
    """What the reference does; the fields say the same as the JSON's."""

    lr: Callable[[int], float]
    embedding_lr: Callable[[int], float]
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0
    refactorize_every: int = 0
    refactorization_resets: bool = False
    refactorization_transports: bool = False  # the rule's momentum, which is linear in the gradients
    reset_every: int = 0
    reset_all: bool = False
    ramp_steps: int = 10
    rule: tuple[str, Mapping[str, Any]] | None = None  # on the factors: its type and settings; None for AdamW


class Reference:
    """The model, Adam's moments and the counts, in plain dictionaries by parameter name."""

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        self.model = model
        self.recipe = recipe
        self.weights = dict(model.named_parameters())
        self.m = {name: torch.zeros_like(w) for name, w in self.weights.items()}
        self.v = {name: torch.zeros_like(w) for name, w in self.weights.items()}
        self.t = dict.fromkeys(self.weights, 0)
        self.since_reset: dict[str, int | None] = dict.fromkeys(self.weights)
        self.step_count = 0
        self.factors = [name for name in self.weights if name.endswith((".A", ".B"))]
        self.rules: dict[str, Any] = {}
        if recipe.rule is not None:
            rule, settings = recipe.rule
            for name in self.factors:
                shape = tuple(self.weights[name].shape)
                self.rules[name] = reference_for(rule, shape, settings, seed=0, name=name, phase=0, names=self.factors)

    def step(self, micro_batches: Iterable[Tensor]) -> float:
        """One update from the mean gradient of the micro-batches (each: token ids, (sequences, length))."""
        micro_batches = list(micro_batches)
        total = 0.0
        self.model.zero_grad()
        for ids in micro_batches:
            loss = self.model(input_ids=ids, labels=ids).loss / len(micro_batches)
            loss.backward()
            total += loss.item()
        self._clip()
        self._update()
        self.step_count += 1
        self._events()
        return total

    def _clip(self) -> None:
        norm = math.sqrt(sum(w.grad.double().square().sum().item() for w in self.weights.values()))
        for w in self.weights.values():
            w.grad.mul_(min(1.0, self.recipe.clip / (norm + 1e-6)))

    @torch.no_grad()
    def _update(self) -> None:
        r = self.recipe
        b1, b2 = r.betas
        for name, w in self.weights.items():
            dense = "embed" in name or "lm_head" in name
            lr = (r.embedding_lr if dense else r.lr)(self.step_count)
            k = self.since_reset[name]
            if k is not None:
                lr *= 0.001 + 0.999 * min(1.0, k / r.ramp_steps)
                self.since_reset[name] = k + 1
            decay = r.weight_decay if w.ndim > 1 else 0.0
            if name in self.rules:
                self.rules[name].step(w, w.grad, lr, decay)
                continue
            self.t[name] += 1
            self.m[name] = b1 * self.m[name] + (1 - b1) * w.grad
            self.v[name] = b2 * self.v[name] + (1 - b2) * w.grad**2
            m_hat = self.m[name] / (1 - b1 ** self.t[name])
            v_hat = self.v[name] / (1 - b2 ** self.t[name])
            w.sub_(lr * (m_hat / (v_hat.sqrt() + r.eps) + decay * w))

    @torch.no_grad()
    def _events(self) -> None:
        r = self.recipe
        if r.refactorize_every and self.step_count % r.refactorize_every == 0:
            for name in self.factors:
                if name.endswith(".B"):
                    self._refactorize(name, name[:-1] + "A")
            if r.refactorization_resets:
                self._reset(self.factors)
        if r.reset_every and self.step_count % r.reset_every == 0:
            names = list(self.weights) if r.reset_all else self.factors
            self._reset(names)
            for name in names:
                self.since_reset[name] = 0

    def _refactorize(self, b_name: str, a_name: str) -> None:
        b, a = self.weights[b_name], self.weights[a_name]
        old = b.double()
        u, s, vh = torch.linalg.svd(b.double() @ a.double(), full_matrices=False)
        rank = b.shape[1]
        root = s[:rank].sqrt()
        b.copy_(u[:, :rank] * root)
        a.copy_(root[:, None] * vh[:rank])
        if self.recipe.refactorization_transports:
            # B = B_old M and A = M⁻¹ A_old. dL/dB = G Aᵀ is (G A_oldᵀ) M⁻ᵀ, and dL/dA = Bᵀ G is Mᵀ (B_oldᵀ G).
            turn = torch.linalg.lstsq(old, u[:, :rank] * root).solution
            self.rules[b_name].M = (self.rules[b_name].M.double() @ torch.linalg.inv(turn).T).float()
            self.rules[a_name].M = (turn.T @ self.rules[a_name].M.double()).float()

    def _reset(self, names: list[str]) -> None:
        for name in names:
            if name in self.rules:
                self.rules[name].reset()
            self.m[name].zero_()
            self.v[name].zero_()
            self.t[name] = 0
