"""A model whose gradients are set by hand: the shapes of a LLaMA, without its forward and backward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from megalr.layers import matching

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

TARGETS = ("attn", "mlp")
VARIANTS = 2  # gradients that the steps alternate between
SIGNAL = 1e-3  # the largest singular value, about that of a small LLaMA's gradient after the first steps
SIGNAL_RANK = 4  # the signal's rank is the shorter side's, divided by this
NOISE = 0.01  # largest singular value of the noise against the signal's


class Workload:
    """Weights that all contenders update, and gradients that all of them are given.

    Gradients of matrices have singular values that decay as 1/i down to a floor of noise; the signal is the same at
    all steps and the noise alternates, so a decomposition finds what it would find in training. How long an update
    takes depends on nothing else.

    Attributes:
        matrices: the parameters that matrix rules update, by qualified name.
        rest: the others, which get AdamW.
    """

    def __init__(self, model: LlamaForCausalLM, *, seed: int = 0) -> None:
        """
        Args:
            model: with weights; its gradients are overwritten.
            seed: of the gradients.
        """
        self.model = model
        named = dict(model.named_parameters())
        candidates = {name: p for name, p in named.items() if p.ndim == 2}
        chosen = matching(candidates, TARGETS, "target_modules", "matrix")
        self.matrices = {name: p for name, p in named.items() if name in chosen}
        self.rest = {name: p for name, p in named.items() if name not in chosen}
        generator = torch.Generator().manual_seed(seed)
        self._gradients = {name: _variants(p, generator) for name, p in self.matrices.items()}
        self._copies: dict[str, Tensor] = {}
        for parameter in self.rest.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator).mul_(SIGNAL * NOISE)

    def refresh(self, step: int, *, own_copies: bool = False) -> None:
        """Set the gradients of a step.

        Args:
            step: its index.
            own_copies: for an optimizer that writes into its gradients.
        """
        for name, parameter in self.matrices.items():
            gradient = self._gradients[name][step % VARIANTS]
            if own_copies:
                gradient = self._copies.setdefault(name, torch.empty_like(gradient)).copy_(gradient)
            parameter.grad = gradient


def _variants(parameter: nn.Parameter, generator: torch.Generator) -> list[Tensor]:
    m, n = parameter.shape
    rank = max(1, min(m, n) // SIGNAL_RANK)
    left = torch.randn(m, rank, generator=generator).div_(m**0.5)  # nearly orthonormal columns
    right = torch.randn(n, rank, generator=generator).div_(n**0.5)
    signal = (left / torch.arange(1, rank + 1)) @ right.T  # (m, n)
    spread = NOISE / (m**0.5 + n**0.5)  # of each element, for a largest singular value of NOISE
    noisy = [signal.add(torch.randn(m, n, generator=generator), alpha=spread) for _ in range(VARIANTS)]
    return [gradient.mul_(SIGNAL) for gradient in noisy]
