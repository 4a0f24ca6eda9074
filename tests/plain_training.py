"""One plain PyTorch process that trains a model with a matrix rule: no DeepSpeed, nothing of megalr's optimizer.

Gradients of the whole batch, clipping, the rule's reference on each matrix, AdamW's on everything else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tests.references import REFERENCES, hyperparameters, reference_for


def plain_training(
    model: nn.Module, data: Sequence[Tensor], optimizer: str, params: dict[str, Any], *, clip: float
) -> dict[str, Tensor]:
    """Train in place; the weights by name.

    Args:
        model: with a loss in what it returns.
        data: token ids of each update, (sequences, length).
        optimizer: the JSON's ``optimizer.type``.
        params: the JSON's ``optimizer.params``; ``target_modules`` a list of substrings.
        clip: the largest norm of all gradients together.
    """
    weights = {name: w for name, w in model.named_parameters() if w.requires_grad}
    updates = _Updates(weights, optimizer, params)
    for ids in data:
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        grads = {n: torch.zeros_like(w) if w.grad is None else w.grad for n, w in weights.items()}
        norm = math.sqrt(sum(g.double().square().sum().item() for g in grads.values()))
        with torch.no_grad():
            for name, w in weights.items():
                updates.step(name, w, grads[name] * min(1.0, clip / (norm + 1e-6)))
    return {name: w.detach().clone() for name, w in model.named_parameters()}


class _Updates:
    """A reference for each matrix of each parameter, and the settings of the parameter's group."""

    def __init__(self, weights: dict[str, Tensor], optimizer: str, params: dict[str, Any]) -> None:
        targets = params.get("target_modules", [])
        chosen = [n for n, w in weights.items() if w.ndim > 1 and any(t in n for t in targets)]
        ends = _ends(weights, params)
        chosen += ends
        matrices = {n: 1 if weights[n].ndim == 2 else weights[n].shape[0] for n in chosen}
        names = [n if weights[n].ndim == 2 else f"{n}[{i}]" for n in chosen for i in range(matrices[n])]
        gap, count = params.get("update_proj_gap", 200), len(names)
        stagger = params.get("stagger", True)
        phases = {name: i * gap // count if stagger else 0 for i, name in enumerate(names)}
        self.references: dict[str, list[Any]] = {}
        self.settings: dict[str, dict[str, Any]] = {}
        # A rule's own betas and epsilon serve the other groups as well.
        known = hyperparameters(REFERENCES[optimizer]) | params
        adam = {key: known[key] for key in ("betas", "eps") if key in known}
        for name, w in weights.items():
            if name in chosen:
                shape = (w.shape[-2], w.shape[-1])
                stack = [name] if w.ndim == 2 else [f"{name}[{i}]" for i in range(w.shape[0])]
                given = {**params, "part": ends.get(name, "matrix")}
                self.references[name] = [
                    reference_for(optimizer, shape, given, seed=0, name=n, phase=phases[n], names=names) for n in stack
                ]
                group: dict[str, Any] = params.get("embedding", {}) if name in ends else {}
            else:
                self.references[name] = [reference_for("AdamW", tuple(w.shape), adam, seed=0, name=name, phase=0)]
                group = dict(params.get("adamw", {}))
                if "embed" in name or "lm_head" in name:
                    group |= params.get("embedding", {})
                elif w.ndim < 2:
                    group |= {"weight_decay": 0.0, **params.get("norm", {})}
            self.settings[name] = {"lr": params["lr"], "weight_decay": params.get("weight_decay", 0.0), **group}

    def step(self, name: str, w: Tensor, grad: Tensor) -> None:
        settings, references = self.settings[name], self.references[name]
        stacked = len(references) > 1
        for reference, matrix, slope in zip(
            references, w if stacked else [w], grad if stacked else [grad], strict=True
        ):
            reference.step(matrix, slope, settings["lr"], settings["weight_decay"])


def _ends(weights: dict[str, Tensor], params: dict[str, Any]) -> dict[str, str]:
    """Of the embedding and the output head what the rule gets, and as which of the two; a tied head is a head."""
    tied = not any("lm_head" in name for name in weights)
    ends = {}
    for name in weights:
        part = "head" if "lm_head" in name or ("embed" in name and tied) else "embedding"
        if ("lm_head" in name or "embed" in name) and params.get({"head": "head", "embedding": "embeddings"}[part]):
            ends[name] = part
    return ends
