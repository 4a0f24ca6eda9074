"""SwitchLoRA: W = W0 + s Σ b_i a_iᵀ with single vectors b_i, a_i replaced by candidates, arXiv 2406.06564."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn
from torch.nn import functional

from megalr.errors import UserError
from megalr.layers.base import FactorizedLinear, KeepsWeight, MergeRounding
from megalr.layers.low_rank import ScaledParametrization, uniform_
from megalr.schema import require

KAIMING_GAIN = 1 / math.sqrt(3)  # of a leaky ReLU with slope sqrt(5), torch's for linear layers
SLOWED = 0.3  # switches become so much rarer within ``descent_steps``


@dataclass(frozen=True, kw_only=True)
class SwitchLoraConfig(ScaledParametrization):
    """W = W0 + (alpha / rank) Bᵀ A in place of every linear layer that ``target_modules`` names.

    W0 (m, n) is the layer's own weight, frozen. B is kept as (r, m), so that the vectors b_i and a_i are both rows.
    After each update some rows of A and some of B are switched, in turn: the row gives way to a candidate, W0 takes the
    difference, so that W stays, the moments of the row's counterpart in the other factor become zero, and the
    counterpart rests for a few updates. The min(m, n) - r candidates of each factor form a queue, at the end of which
    the row lines up. Both factors start at random, with the published variances, which fit ``alpha`` = 1.
    Source: arXiv 2406.06564 and its code, with a learning rate of 0.02 at 350M parameters.

    Floats of an m x n layer: m n of W0, without gradient or state; (m + n) r trained, 2 (m + n) r of AdamW's moments;
    and on the CPU, in the model's dtype, the rows that were switched out and wait, at most (m + n) (min(m, n) - r), of
    which each rank of ZeRO 1 to 3 keeps its share.

    Attributes:
        switch_interval: number of updates in which each row is switched once, at the start of the run.
        descent_steps: number of updates in which the frequency of switches falls to 0.3 times its value; a tenth of the
            run in the paper. None: the frequency is constant.
        frozen_steps: number of updates that the counterpart of a switched row rests.
        merge_rounding: how the difference is rounded into a 16-bit W0; as for projected layers.
    """

    parts: ClassVar[frozenset[str]] = frozenset({"weight", "B", "A"})
    not_refactorized: ClassVar[str] = "switches single vectors of them"
    not_reset: ClassVar[str] = 'layers reset moments vector by vector: remove "megalr.momentum_reset"'
    not_by_rule: ClassVar[str] = "a switch zeroes moments of AdamW, and each vector has a count of its own"

    type: str = "switchlora"
    alpha: float | None = 1.0
    switch_interval: float = 40.0
    descent_steps: int | None = 2000
    frozen_steps: int = 5
    merge_rounding: MergeRounding = "nearest"

    def __post_init__(self) -> None:
        super().__post_init__()
        where = "megalr.parametrization"
        require(self.rank >= 2, f"{where}.rank is {self.rank}: rows of A and of B take turns, so write at least 2")
        require(self.frozen_steps >= 0, f"{where}.frozen_steps is {self.frozen_steps}; write at least 0")
        least = max(1, 2 * self.frozen_steps)  # the two factors take turns
        require(
            self.switch_interval >= least,
            f"{where}.switch_interval is {self.switch_interval}; with {self.frozen_steps} frozen_steps write at least "
            f"{least}",
        )
        require(
            self.descent_steps is None or self.descent_steps >= 1,
            f"{where}.descent_steps is {self.descent_steps}; write at least 1, or null",
        )

    def check(self, name: str, layer: nn.Linear) -> None:
        super().check(name, layer)
        m, n = layer.out_features, layer.in_features
        if self.rank == min(m, n):
            raise UserError(
                f"megalr.parametrization.rank is {self.rank}, which leaves no candidate to switch in {name}, a {m} x "
                f"{n} matrix: write a rank of at most {min(m, n) - 1}, or leave it out of target_modules"
            )

    def switches(self, updates: int) -> float:
        """Of each factor after so many updates, on average."""
        rate = 1.0 if self.descent_steps is None else SLOWED ** (updates / self.descent_steps)
        return rate * self.rank / self.switch_interval

    def form(self) -> dict[str, str | int | bool]:
        return {"parametrization": self.type, "rank": self.rank}

    def replace(self, layer: nn.Linear, *, seed: int, name: str) -> SwitchLoraLinear:
        new = SwitchLoraLinear(layer.weight, self.rank, scale=self.scale, bias=layer.bias).train(layer.training)
        if not layer.weight.is_meta:
            for factor in new.factors:
                uniform_(getattr(new, factor), new.bound(factor), seed, f"{name}.{factor}")
        return new

    def weight(self, parts: Mapping[str, Tensor]) -> Tensor:
        w, b, a = (parts[key].float() for key in ("weight", "B", "A"))
        return w + self.scale * (b.T @ a)


class SwitchLoraLinear(KeepsWeight, FactorizedLinear):
    """y = x W0ᵀ + s (x Aᵀ) B + bias, in place of ``nn.Linear``.

    Attributes:
        weight: W0, (out_features, in_features), model dtype, frozen.
        B: (rank, out_features), model dtype.
        A: (rank, in_features), model dtype.
        bias: (out_features,) or None.
        scale: s = alpha / rank.
    """

    factors: ClassVar[tuple[str, ...]] = ("B", "A")

    bias: nn.Parameter | None

    def __init__(self, weight: Tensor, rank: int, *, scale: float, bias: nn.Parameter | None) -> None:
        """
        Args:
            weight: the dense layer's parameter; it becomes W0. The factors are trained if it was.
            rank, scale, bias: as they say.
        """
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.rank, self.scale = rank, scale
        trained = weight.requires_grad
        self.B = nn.Parameter(weight.new_empty(rank, self.out_features), requires_grad=trained)
        self.A = nn.Parameter(weight.new_empty(rank, self.in_features), requires_grad=trained)
        self.set_frozen_weight(weight)
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to x of shape (..., in_features)."""
        self.note_call()
        latent = functional.linear(x, self.A) * self.scale  # (..., r)
        return functional.linear(x, self.frozen_weight, self.bias) + latent @ self.B

    def bound(self, factor: Literal["B", "A"] | str) -> float:
        """The start and the candidates of a factor are U(-bound, bound)."""
        m, n, r = self.out_features, self.in_features, self.rank
        variance = r / math.sqrt(m * n) if factor == "B" else math.sqrt(m) * r / n**1.5
        return math.sqrt(3 * KAIMING_GAIN * math.sqrt(variance))

    def extra_repr(self) -> str:
        """What ``print(model)`` shows of this layer."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"scale={self.scale:g}, bias={self.bias is not None}"
        )
