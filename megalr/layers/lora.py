"""LoRA, W = W0 + s B A with W0 frozen (arXiv 2106.09685), and ReLoRA, which merges s B A into W0 (arXiv 2307.05695)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn
from torch.nn import functional

from megalr.layers.low_rank import LowRankLinear, ScaledParametrization, uniform_
from megalr.schema import check_ramp, require

MergeRounding = Literal["nearest", "stochastic", "remainder"]


@dataclass(frozen=True, kw_only=True)
class LoraConfig(ScaledParametrization):
    """W = W0 + (alpha / rank) B A in place of every linear layer that ``target_modules`` names.

    W0 (m, n) is the layer's own weight, frozen, in the model's dtype: random in a model that starts from nothing, and
    what was learnt in one that starts from dense weights. B (m, r) starts at zero and A (r, n) as
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


@dataclass(frozen=True, kw_only=True)
class ReloraConfig(LoraConfig):
    """LoRA whose factors start again every ``merge_every`` updates, so that W0 gains up to r of rank each time.

    After such an update W0 <- W0 + s B A, B <- 0, A is drawn anew, most of the factors' moments become zero, and the
    factors' learning rate warms up again: the jagged schedule. A dense warm start is a model that has dense weights
    already: train with "full", export, and start from that model; its weights are the W0. Source: arXiv 2307.05695 and
    its code, whose interval and warm-up these are; the published learning rate is twice that of dense training.

    Floats of an m x n layer: as LoRA, m n frozen, (m + n) r trained, 2 (m + n) r of AdamW's moments.

    Attributes:
        merge_every: updates between two merges.
        restart_warmup_steps: updates in which the factors' learning rate rises from 0.001 of the schedule's to all
            of it after a merge; below ``merge_every``. The published code has all parameters follow that.
        moments: what becomes of the factors' moments: "magnitude" leaves the largest of each factor's first and of its
            second moments, "random" a random set of elements, and the count of updates; "reset" zeroes all, and the
            count; "keep" leaves all. A first moment whose second one is zeroed is zeroed as well: it would be divided
            by next to nothing, as it is in the published code.
        prune_ratio: the share of each factor's moments that becomes zero.
        merge_rounding: how W0 + s B A becomes W0 in a model of 16 bits; as that of projected layers.
    """

    not_refactorized: ClassVar[str] = "has a B that starts again at zero"
    not_reset: ClassVar[str] = (
        'layers restart their moments themselves: remove "megalr.momentum_reset" and write "moments": "reset" and '
        '"restart_warmup_steps" in "megalr.parametrization"'
    )
    not_by_rule: ClassVar[str] = "a merge zeroes moments of AdamW"

    type: str = "relora"
    merge_every: int = 5000
    restart_warmup_steps: int = 100
    moments: Literal["magnitude", "random", "reset", "keep"] = "magnitude"
    prune_ratio: float = 0.99
    merge_rounding: MergeRounding = "nearest"

    def __post_init__(self) -> None:
        super().__post_init__()
        where = "megalr.parametrization"
        require(self.merge_every >= 1, f"{where}.merge_every is {self.merge_every}; write at least 1")
        check_ramp(self, "restart_warmup_steps", "merge_every", where)
        require(
            0 < self.prune_ratio <= 1, f"{where}.prune_ratio is {self.prune_ratio}; write a share above 0, at most 1"
        )

    def form(self) -> dict[str, str | int | bool]:
        return {"parametrization": self.type, "rank": self.rank}


class LoraLinear(LowRankLinear):
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
        self.weight = weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to x of shape (..., in_features)."""
        latent = functional.linear(x, self.A) * self.scale  # (..., r)
        return functional.linear(x, self.weight, self.bias) + functional.linear(latent, self.B)


def draw_a_(a: Tensor, seed: int, name: str, *count: int) -> None:
    """A's start, U(-1/sqrt(n), 1/sqrt(n)), in place; ``count`` tells one start from the next."""
    uniform_(a, 1 / math.sqrt(a.shape[1]), seed, f"{name}.A", *count)
