"""Gradients like those of training, and a rule's and a reference's weights along them."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from megalr.rules.base import Rule, Shape
from megalr.rules.registry import RULES
from tests.references import REFERENCES, Reference

SEED, NAME = 3, "layers.0.mlp.weight"
LR, WEIGHT_DECAY = 0.01, 0.1

# Wide, tall, square, one row, one column, smaller than a rank of 4 in either direction, odd.
SHAPES = [(12, 20), (20, 12), (16, 16), (1, 9), (9, 1), (3, 10), (10, 3), (7, 13)]


def needed(type_name: str) -> dict[str, Any]:
    """The keys of "optimizer.params" without which a rule is refused, with values for tests that need none."""
    rule = RULES[type_name]
    fields = [] if rule is None else dataclasses.fields(rule)
    keys = [field.name for field in fields if field.default is dataclasses.MISSING]
    return {key: REFERENCES[type_name].short[key] for key in keys}


def drifting_gradients(shape: Shape, count: int, *, seed: int = 0, decay: float = 0.7) -> list[Tensor]:
    """Matrices of one spectrum, which decays geometrically, whose singular vectors turn slowly."""
    generator = torch.Generator().manual_seed(seed)
    size = min(shape)
    spectrum = decay ** torch.arange(size)
    left, right = (torch.randn(rows, size, generator=generator) for rows in shape)
    gradients = []
    for _ in range(count):
        left = left + 0.1 * torch.randn(left.shape, generator=generator)
        right = right + 0.1 * torch.randn(right.shape, generator=generator)
        gradients.append((torch.linalg.qr(left)[0] * spectrum) @ torch.linalg.qr(right)[0].T)
    return gradients


def rule_weights(rule: Rule, gradients: list[Tensor], *, phase: int = 0) -> list[Tensor]:
    """The weights after each update, from zero, as an owner makes them."""
    shape = (gradients[0].shape[0], gradients[0].shape[1])
    state = rule.init_state(shape)
    weight, weights = torch.zeros(shape), []
    for updates, grad in enumerate(gradients):
        basis = None
        if rule.refresh_due(state, updates, phase):
            basis = rule.new_basis(grad, state, updates=updates, seed=SEED, name=NAME)
        weight = weight - LR * (rule.update(grad, state, basis) + WEIGHT_DECAY * weight)
        weights.append(weight)
    return weights


def reference_weights(reference: Reference, gradients: list[Tensor]) -> list[Tensor]:
    """The same of a reference, in fp64."""
    weight, weights = torch.zeros(gradients[0].shape, dtype=torch.float64), []
    for grad in gradients:
        reference.step(weight, grad.double(), LR, WEIGHT_DECAY)
        weights.append(weight.clone())
    return weights


def worst(got: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative difference of two runs, by Frobenius norm; NaN if any is."""
    return torch.stack([(g - e).norm() / e.norm() for g, e in zip(got, expected, strict=True)]).max().item()


def run_from(rule, state, gradients, start=0):
    """The updates, with the state as it is after ``start`` others; it is modified in place."""
    made = []
    for updates, grad in enumerate(gradients, start):
        due = rule.refresh_due(state, updates, 0)
        basis = rule.new_basis(grad, state, updates=updates, seed=SEED, name=NAME) if due else None
        made.append(rule.update(grad, state, basis))
    return made
