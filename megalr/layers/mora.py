"""MoRA: W = W0 + D M C with a trained square M and fixed C, D without parameters, arXiv 2405.12130."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from megalr.errors import UserError
from megalr.kept import kept
from megalr.layers.base import FactorizedLinear, KeepsWeight, Parametrization

ROPE_BASE = 10000.0


@dataclass(frozen=True, kw_only=True)
class MoraConfig(Parametrization):
    """y = x W0ᵀ + decompress(M compress(x)) + bias in place of every linear layer that ``target_modules`` names.

    W0 (m, n) is the layer's own weight, frozen. M (r̂, r̂) has no more elements than B and A of LoRA with that r, but its
    change of W has a rank of r̂ or more: r̂ = floor(sqrt((m + n) r)), and at most m and n. M starts at zero.
    Source: arXiv 2405.12130 and its code, which rounds the root to nearest and so may have more elements than LoRA.

    Floats of an m x n layer: m n of W0, without gradient or state; r̂² ≤ (m + n) r trained, 2 r̂² of AdamW's moments.

    Attributes:
        mora_type: 1 shares: compressed element i is the sum of the elements of x at places i modulo r̂, and the output
            of M is repeated. 6 rotates: each run of r̂ elements of x goes through M, rotated by its number as positions
            are in RoPE, and the results are concatenated; r̂ is even. The last run is filled up with the first
            elements of x, as published.
        published: round r̂ to nearest, as the published code does.
    """

    parts: ClassVar[frozenset[str]] = frozenset({"weight", "M"})
    not_refactorized: ClassVar[str] = "has one square matrix instead"
    instead: ClassVar[Mapping[str, str]] = {"alpha": "the published layer has no scale"}

    type: str = "mora"
    mora_type: Literal[1, 6] = 6
    published: bool = False

    def side(self, shape: torch.Size | tuple[int, int]) -> int:
        """r̂ of an m x n matrix."""
        elements = sum(shape) * self.rank
        side = min(int(elements**0.5 + 0.5) if self.published else math.isqrt(elements), *shape)
        return side // 2 * 2 if self.mora_type == 6 else side

    def check(self, name: str, layer: nn.Linear) -> None:
        super().check(name, layer)
        m, n = layer.out_features, layer.in_features
        if self.side((m, n)) == 0:
            raise UserError(f"{name} is a {m} x {n} matrix, too small for MoRA: leave it out of target_modules")

    def replace(self, layer: nn.Linear, *, seed: int, name: str) -> MoraLinear:
        side = self.side(layer.weight.shape)
        return MoraLinear(layer.weight, side, mora_type=self.mora_type, bias=layer.bias).train(layer.training)

    def weight(self, parts: Mapping[str, Tensor]) -> Tensor:
        w, matrix = (parts[key].to(torch.float32) for key in ("weight", "M"))
        unit = torch.eye(w.shape[1], device=w.device)
        return w + square_map(unit, matrix, w.shape[0], self.mora_type).T


class MoraLinear(KeepsWeight, FactorizedLinear):
    """y = x W0ᵀ + decompress(M compress(x)) + bias, in place of ``nn.Linear``.

    Attributes:
        weight: W0, (out_features, in_features), model dtype, frozen.
        M: (r̂, r̂), model dtype.
        bias: (out_features,) or None.
    """

    factors: ClassVar[tuple[str, ...]] = ("M",)

    bias: nn.Parameter | None

    def __init__(self, weight: Tensor, side: int, *, mora_type: Literal[1, 6], bias: nn.Parameter | None) -> None:
        """
        Args:
            weight: the dense layer's parameter; it becomes W0. M is trained if it was.
            side: r̂.
            mora_type: see :class:`MoraConfig`.
            bias: the dense layer's.
        """
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.side = side
        self.mora_type: Literal[1, 6] = mora_type
        self.M = nn.Parameter(weight.new_zeros(side, side), requires_grad=weight.requires_grad)
        self.set_frozen_weight(weight)
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to x of shape (..., in_features)."""
        self.note_call()
        learned = square_map(x, self.M, self.out_features, self.mora_type)
        return functional.linear(x, self.frozen_weight, self.bias) + learned

    def extra_repr(self) -> str:
        """What ``print(model)`` shows of this layer."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, side={self.side}, "
            f"mora_type={self.mora_type}, bias={self.bias is not None}"
        )


def square_map(x: Tensor, matrix: Tensor, out_features: int, mora_type: Literal[1, 6]) -> Tensor:
    """decompress(M compress(x)).

    Args:
        x: (..., n).
        matrix: M, (r̂, r̂).
        out_features: m.
        mora_type: see :class:`MoraConfig`.

    Returns:
        (..., m).
    """
    side = matrix.shape[0]
    runs = -(-x.shape[-1] // side)
    filled = torch.cat([x, x[..., : runs * side - x.shape[-1]]], -1).unflatten(-1, (runs, side))  # (..., runs, r̂)
    if mora_type == 1:
        out = functional.linear(filled.sum(-2), matrix)  # (..., r̂)
    else:
        cos, sin = _rotations(runs, side, x.device, x.dtype)
        left, right = filled.chunk(2, -1)
        turned = filled * cos + torch.cat([-right, left], -1) * sin
        out = functional.linear(turned, matrix).flatten(-2)  # (..., runs r̂)
    times = -(-out_features // out.shape[-1])
    return torch.cat([out] * times, -1)[..., :out_features]


@kept
def _rotations(runs: int, side: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of run i's angles, (runs, r̂), as of position i in RoPE (arXiv 2104.09864)."""
    frequencies = ROPE_BASE ** -(torch.arange(0, side, 2, device=device) / side)
    angles = torch.outer(torch.arange(runs, device=device), frequencies).repeat(1, 2)
    return angles.cos().to(dtype), angles.sin().to(dtype)
