"""One plain PyTorch process that trains dense weights W = W0 + R Qᵀ as projected layers are to train them.

It sees whole gradients of whole weights and writes whole weights back; nothing of megalr's layers or optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megalr.seeding import generator
from tests.references.common import Adam, leading_singular_vectors, orthonormal

GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def plain_projected(
    model: nn.Module, data: Sequence[Tensor], section: dict[str, Any], params: dict[str, Any], *, clip: float
) -> dict[str, Tensor]:
    """Train in place; the weights by name.

    Args:
        model: dense, with a loss in what it returns.
        data: token ids of each update, (sequences, length).
        section: the JSON's ``megalr.parametrization``; ``target_modules`` a list of substrings.
        params: the JSON's ``optimizer.params``.
        clip: the largest norm of the gradients of all R and of everything that is not projected.
    """
    weights = {name: w for name, w in model.named_parameters() if w.requires_grad}
    linear = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    targets = [n for n in weights if n in linear and any(t in n for t in section["target_modules"])]
    units = _units(targets, section.get("share_basis", section.get("side", "input") == "input"))
    gap = section["update_proj_gap"]
    stagger = section.get("stagger", True)
    phases = [i * gap // len(units) if stagger else 0 for i in range(len(units))]
    bases = [_Basis([weights[n] for n in unit], unit[0], section, params) for unit in units]
    rest = {n: Adam(params.get("betas", (0.9, 0.999)), params.get("eps", 1e-8)) for n in weights if n not in targets}
    for t, ids in enumerate(data):
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        grads = {n: torch.zeros_like(w) if w.grad is None else w.grad for n, w in weights.items()}
        with torch.no_grad():
            lows = [basis.low(g) for basis in bases for g in _of(basis, weights, grads)]
            square = sum(g.double().square().sum().item() for g in lows)
            square += sum(grads[n].double().square().sum().item() for n in rest)
            factor = min(1.0, clip / (math.sqrt(square) + 1e-6))
            for basis, phase in zip(bases, phases, strict=True):
                own = _of(basis, weights, grads)
                if t % gap == phase and not basis.random_at(t):
                    basis.refresh(torch.cat(own) if basis.right else own[0])
                basis.step([basis.low(g) * factor for g in own])
            for name, adam in rest.items():
                w, settings = weights[name], dict(params)
                if "embed" in name or "lm_head" in name:
                    settings |= params.get("embedding", {})
                elif w.ndim < 2:
                    settings |= {"weight_decay": 0.0}
                decay = settings.get("weight_decay", 0.0)
                w -= settings["lr"] * (adam.direction(grads[name] * factor) + decay * w)
            for basis, phase in zip(bases, phases, strict=True):
                if (t + 1) % gap == phase and basis.random_at(t + 1):
                    basis.refresh(None)  # it needs no gradient, so it comes before the next one
    return {name: w.detach().clone() for name, w in model.named_parameters()}


def _units(targets: list[str], share: bool) -> list[list[str]]:
    """The names that have a basis together."""
    units: dict[tuple[str, ...], list[str]] = {}
    for name in targets:
        parent, _, last = name.removesuffix(".weight").rpartition(".")
        group = next((g for g in GROUPS if share and last in g), (last,))
        units.setdefault((parent, *group), []).append(name)
    return list(units.values())


def _of(basis: _Basis, weights: dict[str, Tensor], grads: dict[str, Tensor]) -> list[Tensor]:
    return [grads[next(n for n, w in weights.items() if w is matrix)] for matrix in basis.matrices]


class _Basis:
    """W0, R and Adam of the matrices that have a basis together; written for Q on the right, P is it for Wᵀ."""

    def __init__(self, matrices: list[Tensor], name: str, section: dict[str, Any], params: dict[str, Any]) -> None:
        m, n = matrices[0].shape
        side = section.get("side", "input")
        self.right = side == "input" or (side == "std" and m >= n)
        self.matrices, self.name, self.section, self.params = matrices, name, section, params
        self.rank, self.refreshes, self.owed = section["rank"], 0, 1.0
        self.W0 = [w.detach().clone() for w in matrices]
        self.Q = self._random()
        self.refreshes = int(self.random_at(0))
        self.R = [torch.zeros(w.shape[0] if self.right else w.shape[1], self.rank) for w in matrices]
        self.adams = [Adam(params.get("betas", (0.9, 0.999)), params.get("eps", 1e-8)) for _ in matrices]

    def random_at(self, t: int) -> bool:
        start = self.section.get("random_from")
        return self.section.get("projector") == "random" or (start is not None and t >= start)

    def low(self, G: Tensor) -> Tensor:
        return (G if self.right else G.T) @ self.Q

    def refresh(self, G: Tensor | None) -> None:
        if G is None:
            Q = self._random()
        else:
            side = G.T if self.right else G
            Q = leading_singular_vectors(side, self.rank, self.Q if self.refreshes else None)
        for i, R in enumerate(self.R):
            learned = R @ self.Q.T
            self.W0[i] = self.owed * self.W0[i] + (learned if self.right else learned.T)
            self.R[i] = torch.zeros_like(R)
            self.matrices[i].copy_(self.W0[i])
            adam, turn = self.adams[i], self.Q.T @ Q
            if self.section.get("moments") == "reset":
                adam.reset()
            if self.section.get("moments") in ("transport", "transport_first") and adam.t:
                adam.m = adam.m @ turn
                adam.v = adam.v @ turn**2 if self.section["moments"] == "transport" else adam.v
        self.Q, self.owed = Q, 1.0
        self.refreshes += 1

    def step(self, lows: list[Tensor]) -> None:
        lr, decay = self.params["lr"], self.params.get("weight_decay", 0.0)
        for i, low in enumerate(lows):
            self.R[i] = self.R[i] - lr * (self.adams[i].direction(low) + decay * self.R[i])
            learned = self.R[i] @ self.Q.T
            self.matrices[i].copy_(self.W0[i] + (learned if self.right else learned.T))
        self.owed *= 1 - lr * decay

    def _random(self) -> Tensor:
        m, n = self.matrices[0].shape
        random = generator(0, self.name, "right" if self.right else "left", self.refreshes)
        return orthonormal(torch.randn(n if self.right else m, self.rank, generator=random))
