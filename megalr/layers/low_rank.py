"""Low-rank layers: W = s B A, trained from the start, arXiv 2505.22922."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from megalr.errors import UserError
from megalr.layers.base import FactorizedLinear, Parametrization
from megalr.layers.tensor_parallel.messages import StackedLatents
from megalr.layers.tensor_parallel.split import Split, become
from megalr.schema import require
from megalr.seeding import generator


@dataclass(frozen=True, kw_only=True)
class ScaledParametrization(Parametrization):
    """A parametrization with s B A, s = alpha / rank, in it.

    Attributes:
        alpha: numerator of the fixed scale; None stands for ``rank``, that is, a scale of one.
    """

    alpha: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        where = "megalr.parametrization"
        require(self.alpha is None or self.alpha > 0, f"{where}.alpha is {self.alpha}; write a positive number")

    @property
    def scale(self) -> float:
        """alpha / rank, the constant in front of B @ A."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def product(self, parts: Mapping[str, Tensor]) -> Tensor:
        """s B A in fp32."""
        return self.scale * (parts["B"].to(torch.float32) @ parts["A"].to(torch.float32))


@dataclass(frozen=True, kw_only=True)
class LowRankConfig(ScaledParametrization):
    """W = (alpha / rank) * B @ A in place of every linear layer that ``target_modules`` names.

    Attributes:
        init: "variance_matched" gives the product the dense layer's variance, "kaiming_uniform" is the published
            code's start.
    """

    parts: ClassVar[frozenset[str]] = frozenset({"B", "A"})

    type: str = "low_rank"
    init: Literal["variance_matched", "kaiming_uniform"] = "variance_matched"

    def replace(self, layer: nn.Linear, *, seed: int, name: str) -> LowRankLinear:
        weight = layer.weight
        new = LowRankLinear(
            layer.in_features,
            layer.out_features,
            self.rank,
            scale=self.scale,
            bias=layer.bias,
            device=weight.device,
            dtype=weight.dtype,
        ).train(layer.training)
        if weight.is_meta:
            return new
        if self.init == "variance_matched":
            variance_matched_(new, root_mean_square(weight, name), seed, name)
        else:
            kaiming_uniform_(new, seed, name)
        return new

    def cut(self, layer: nn.Module, split: Split) -> None:
        keep_factors(become(layer, split, LowRankLinear, ColumnParallelLowRank, RowParallelLowRank), split)

    def share_inputs(self, layers: Sequence[nn.Module], group: dist.ProcessGroup) -> None:
        alike = [layer for layer in layers if isinstance(layer, ColumnParallelLowRank)]
        latents = StackedLatents(alike, group)
        for layer in alike:
            layer.latents = latents

    def weight(self, parts: Mapping[str, Tensor]) -> Tensor:
        return self.product(parts)


class LowRankLinear(FactorizedLinear):
    """y = s * (x @ A.T) @ B.T + bias, in place of ``nn.Linear``; only the factors exist and only they are trained.

    Attributes:
        B: (out_features, rank), model dtype.
        A: (rank, in_features), model dtype.
        bias: (out_features,) or None.
        scale: s = alpha / rank, a constant. It is applied to the r-wide activation.
    """

    factors: ClassVar[tuple[str, ...]] = ("B", "A")

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        scale: float = 1.0,
        bias: nn.Parameter | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.scale = scale
        self.B = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=dtype))
        self.A = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to x of shape (..., in_features)."""
        latent = functional.linear(x, self.A) * self.scale  # (..., r)
        return functional.linear(latent, self.B, self.bias)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows of this layer."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"scale={self.scale:g}, bias={self.bias is not None}"
        )


class ColumnParallelLowRank(LowRankLinear):
    """Rows of B and of the bias, all of A: x whole, y in parts. Backward, the latent's gradient is summed, r wide.

    Attributes:
        split: between which ranks.
        width: of the whole output.
        latents: of this layer and those that get the same x.
    """

    split: Split
    width: int
    latents: StackedLatents

    def forward(self, x: Tensor) -> Tensor:
        """Apply to x (..., in_features); this rank's part of the output, or all of it."""
        latent = self.latents.of(self, x) * self.scale
        return self.split.output(functional.linear(latent, self.B, self.bias), self.width)


class RowParallelLowRank(LowRankLinear):
    """Columns of A, all of B and of the bias: x in parts, y whole. Forward, the latent is summed, r wide.

    Attributes:
        split: between which ranks.
    """

    split: Split

    def forward(self, x: Tensor) -> Tensor:
        """Apply to this rank's part of x; (..., out_features)."""
        latent = self.split.sum(functional.linear(x, self.A))
        return functional.linear(latent * self.scale, self.B, self.bias)


def keep_factors(layer: Any, split: Split) -> None:
    """Leave this rank its part of a layer's B and bias, or of its A."""
    layer.split, layer.width = split, layer.out_features
    split.keep(layer, *(("B", "bias") if split.rows else ("A",)))
    layer.out_features, layer.in_features = len(layer.B), layer.A.shape[1]


@torch.no_grad()
def variance_matched_(layer: LowRankLinear, dense_std: float, seed: int, name: str) -> None:
    """Start the factors so that s * B @ A has the variance of the dense layer it replaces, and so that they balance.

    An element of B @ A is a sum of r independent products, so its variance is r * var(B) * var(A). With s the
    layer's scale, var(B) * var(A) = dense_std² / (s² r) gives s * B @ A the dense layer's variance: activations and
    gradients start at the size that the architecture was tuned for, whatever the rank and alpha are. The published
    code starts both factors as ``nn.Linear`` does, U(-1/sqrt(fan_in), 1/sqrt(fan_in)), which makes the product too
    small by a factor that grows with the width and costs most of the method's quality. The one freedom left, how the
    size is split between the factors, is used to make E[B.T @ B] = E[A @ A.T], that is m var(B) = n var(A): the
    balance that refactorization restores later.

    Args:
        layer: its ``B`` and ``A`` are modified in place.
        dense_std: standard deviation of the dense layer's weight.
        seed, name: key of the random numbers; the same at every rank and world size.
    """
    m, n = layer.out_features, layer.in_features
    product = dense_std / (layer.scale * math.sqrt(layer.rank))  # std(B) * std(A)
    balance = (n / m) ** 0.25
    normal_(layer.B, math.sqrt(product) * balance, seed, f"{name}.B")
    normal_(layer.A, math.sqrt(product) / balance, seed, f"{name}.A")


@torch.no_grad()
def kaiming_uniform_(layer: LowRankLinear, seed: int, name: str) -> None:
    """The published code's start: both factors U(-1/sqrt(fan_in), 1/sqrt(fan_in)), as ``nn.Linear``'s own."""
    for key, factor in (("B", layer.B), ("A", layer.A)):
        uniform_(factor, 1 / math.sqrt(factor.shape[1]), seed, f"{name}.{key}")


@torch.no_grad()
def uniform_(tensor: Tensor, bound: float, seed: int, *keys: str | int) -> None:
    """U(-bound, bound), in place; drawn in fp32 on the CPU, the same whatever the model's dtype and device are."""
    tensor.copy_((2 * torch.rand(tensor.shape, generator=generator(seed, *keys)) - 1) * bound)


def root_mean_square(weight: Tensor, name: str) -> float:
    """Of a dense weight: rather than the configuration's nominal value it is right for any model and any start."""
    size = torch.linalg.vector_norm(weight.detach(), dtype=torch.float32).item() / weight.numel() ** 0.5
    if size == 0:
        raise UserError(f"{name}.weight is all zeros, so there is no variance to match: initialize the model first")
    return size


@torch.no_grad()
def normal_(factor: Tensor, std: float, seed: int, key: str) -> None:
    """N(0, std²), in place; drawn in fp32 on the CPU, as :func:`uniform_`."""
    factor.copy_(torch.randn(factor.shape, generator=generator(seed, key)) * std)
