"""CoLA: an auto-encoder in place of a weight, y = B σ(A x) with σ = SiLU, arXiv 2502.10940."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from megalr.errors import UserError
from megalr.layers.base import FactorizedLinear, Parametrization
from megalr.layers.low_rank import normal_


@dataclass(frozen=True, kw_only=True)
class ColaConfig(Parametrization):
    """y = B silu(A x) + bias in place of every linear layer that ``target_modules`` names.

    B (m, r) and A (r, n) start as N(0, 1 / sqrt(r (m + n))), as published: their product would have the variance
    1 / (m + n). The published ranks are a quarter of the model's width. What the model has of non-linearities stays.
    No weight of m x n stands for such a layer, so there is no export to a dense model. Source: arXiv 2502.10940 and its
    code, with learning rates of 6e-3 at 60M parameters, 2e-3 at 1B and 3e-3 between, weight decay 0.01 and gradients
    clipped to 0.5.

    Floats of an m x n layer: (m + n) r trained, 2 (m + n) r of AdamW's moments.
    """

    parts: ClassVar[frozenset[str]] = frozenset({"B", "A"})
    not_refactorized: ClassVar[str] = "has a non-linearity between them"
    not_dense: ClassVar[str] = "between B and A is a non-linearity, so no matrix computes the same"
    instead: ClassVar[Mapping[str, str]] = {"alpha": "the published layer has no scale"}

    type: str = "cola"

    def replace(self, layer: nn.Linear, *, seed: int, name: str) -> ColaLinear:
        weight, m, n = layer.weight, layer.out_features, layer.in_features
        new = ColaLinear(n, m, self.rank, bias=layer.bias, device=weight.device, dtype=weight.dtype)
        if not weight.is_meta:
            std = (self.rank * (m + n)) ** -0.25
            normal_(new.B, std, seed, f"{name}.B")
            normal_(new.A, std, seed, f"{name}.A")
        return new.train(layer.training)

    def weight(self, parts: Mapping[str, Tensor]) -> Tensor:
        raise UserError(f'"{self.type}" layers have no dense weight: {self.not_dense}')


class ColaLinear(FactorizedLinear):
    """y = silu(x Aᵀ) Bᵀ + bias, in place of ``nn.Linear``.

    Attributes:
        B: (out_features, rank), model dtype.
        A: (rank, in_features), model dtype.
        bias: (out_features,) or None.
    """

    factors: ClassVar[tuple[str, ...]] = ("B", "A")

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        bias: nn.Parameter | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.B = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=dtype))
        self.A = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to x of shape (..., in_features)."""
        latent = functional.silu(functional.linear(x, self.A))  # (..., r)
        return functional.linear(latent, self.B, self.bias)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows of this layer."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"bias={self.bias is not None}"
        )
