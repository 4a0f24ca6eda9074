"""LoRA: W = W0 + s B A with W0 frozen, arXiv 2106.09685."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional

from megalr.layers.base import KeepsWeight
from megalr.layers.low_rank import LowRankLinear, ScaledParametrization, uniform_


@dataclass(frozen=True, kw_only=True)
class LoraConfig(ScaledParametrization):
    """W = W0 + (alpha / rank) B A in place of every linear layer that ``target_modules`` names.

    W0 (m, n) is the layer's own weight, frozen, in the model's dtype: random in a model that starts from nothing, and
    what was learned in one that starts from dense weights. B (m, r) starts at zero and A (r, n) as
    U(-1/sqrt(n), 1/sqrt(n)), so that W starts as W0. Source: arXiv 2106.09685.

    Floats of an m x n layer: m n of W0, which counts as a weight, without gradient or state; (m + n) r trained, and
    2 (m + n) r of AdamW's moments.
    """

    parts: ClassVar[frozenset[str]] = frozenset({"weight", "B", "A"})
    instead: ClassVar[Mapping[str, str]] = {"init": "B starts at zero and A uniformly, as published"}

    type: str = "lora"

    def replace(self, layer: nn.Linear, *, seed: int, name: str) -> LoraLinear:
        new = LoraLinear(layer.weight, self.rank, scale=self.scale, bias=layer.bias).train(layer.training)
        if not layer.weight.is_meta:
            nn.init.zeros_(new.B)
            draw_a_(new.A, seed, name)
        return new

    def weight(self, parts: Mapping[str, Tensor]) -> Tensor:
        return self.product(parts).add_(parts["weight"])


class LoraLinear(KeepsWeight, LowRankLinear):
    """y = x W0ᵀ + s (x Aᵀ) Bᵀ + bias, in place of ``nn.Linear``; x and x Aᵀ are saved for the backward pass.

    Attributes:
        weight: W0, (out_features, in_features), model dtype, frozen.
        B, A, bias, scale: as those of :class:`~megalr.layers.low_rank.LowRankLinear`.
    """

    def __init__(self, weight: Tensor, rank: int, *, scale: float, bias: nn.Parameter | None) -> None:
        """
        Args:
            weight: the dense layer's parameter; it becomes W0. The factors are trained if it was.
            rank, scale, bias: as they say.
        """
        out_features, in_features = weight.shape
        super().__init__(
            in_features, out_features, rank, scale=scale, bias=bias, device=weight.device, dtype=weight.dtype
        )
        for factor in (self.B, self.A):
            factor.requires_grad_(weight.requires_grad)
        self.set_frozen_weight(weight)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to x of shape (..., in_features)."""
        self.note_call()
        latent = functional.linear(x, self.A) * self.scale  # (..., r)
        return functional.linear(x, self.frozen_weight, self.bias) + functional.linear(latent, self.B)


def draw_a_(a: Tensor, seed: int, name: str, *count: int) -> None:
    """A's start, U(-1/sqrt(n), 1/sqrt(n)), in place; ``count`` tells one start from the next."""
    uniform_(a, 1 / math.sqrt(a.shape[1]), seed, f"{name}.A", *count)
