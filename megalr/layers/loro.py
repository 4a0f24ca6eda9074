"""LORO: W = B A, moved along the manifold of matrices of rank r, ICLR 2025, openreview i0zzO7Hslk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from megalr.layers.base import Parametrization
from megalr.layers.low_rank import LowRankLinear, normal_, root_mean_square, variance_matched_
from megalr.schema import check_ramp, require


@dataclass(frozen=True, kw_only=True)
class LoroConfig(Parametrization):
    """W = B A in place of every linear layer that ``target_modules`` names, trained by LORO.

    Most updates are lazy: AdamW on B (m, r) and A (r, n) with ``lazy_lr_scale`` times the learning rate. Every
    ``exact_every``-th is a step on the manifold instead, see :mod:`megalr.optim.events.loro`: the step that follows
    Adam's directions of B and A as if they were the Euclidean gradient's, with the whole learning rate, onto the
    nearest W of rank r, which is split evenly into B and A. After it moments and learning rate start again.
    Source: ICLR 2025, openreview i0zzO7Hslk, and its code, with a learning rate of 0.01, at 1B 0.005.

    Floats of an m x n layer: (m + n) r trained, 2 (m + n) r of AdamW's moments.

    Attributes:
        exact_every: K, updates between two exact steps; 500 in the published runs, 200 at 1B.
        lazy_lr_scale: factor on the learning rate of lazy updates. None: r / min(m, n), as published for square
            matrices and for LLaMA's.
        restart: parameters whose moments become zero and whose learning rate warms up again after an exact step: "all"
            as published, or the "factors".
        restart_warmup_steps: length of that warm-up in updates, from 0.001 of the scheduled learning rate to all of
            it; below ``exact_every``.
        init: "xavier" as published: B as N(0, 2 / (m + r)), A as N(0, 2 / (n + r)). "variance_matched": the product
            has the variance of the dense layer.
    """

    parts: ClassVar[frozenset[str]] = frozenset({"B", "A"})
    not_refactorized: ClassVar[str] = "refactorizes them at each exact step itself"
    not_reset: ClassVar[str] = (
        'layers restart their moments themselves: remove "megalr.momentum_reset" and write "restart" and '
        '"restart_warmup_steps" in "megalr.parametrization"'
    )
    not_by_rule: ClassVar[str] = "an exact step follows the directions of Adam"
    instead: ClassVar[Mapping[str, str]] = {"alpha": 'the published layer has no scale; "lazy_lr_scale" is another'}

    type: str = "loro"
    exact_every: int = 500
    lazy_lr_scale: float | None = None
    restart: Literal["all", "factors"] = "all"
    restart_warmup_steps: int = 20
    init: Literal["xavier", "variance_matched"] = "xavier"

    def __post_init__(self) -> None:
        super().__post_init__()
        where = "megalr.parametrization"
        require(self.exact_every >= 1, f"{where}.exact_every is {self.exact_every}; write at least 1")
        check_ramp(self, "restart_warmup_steps", "exact_every", where)
        require(
            self.lazy_lr_scale is None or self.lazy_lr_scale > 0,
            f"{where}.lazy_lr_scale is {self.lazy_lr_scale}; write a positive number",
        )

    def lazy_scale(self, layer: LowRankLinear) -> float:
        """The factor on a layer's learning rate in lazy updates."""
        size = min(layer.out_features, layer.in_features)
        return layer.rank / size if self.lazy_lr_scale is None else self.lazy_lr_scale

    def form(self) -> dict[str, str | int | bool]:
        return {"parametrization": self.type, "rank": self.rank}

    def replace(self, layer: nn.Linear, *, seed: int, name: str) -> LowRankLinear:
        weight, m, n = layer.weight, layer.out_features, layer.in_features
        new = LowRankLinear(n, m, self.rank, bias=layer.bias, device=weight.device, dtype=weight.dtype)
        if weight.is_meta:
            return new.train(layer.training)
        if self.init == "variance_matched":
            variance_matched_(new, root_mean_square(weight, name), seed, name)
        else:
            normal_(new.B, (2 / (m + self.rank)) ** 0.5, seed, f"{name}.B")
            normal_(new.A, (2 / (n + self.rank)) ** 0.5, seed, f"{name}.A")
        return new.train(layer.training)

    def weight(self, parts: Mapping[str, Tensor]) -> Tensor:
        return parts["B"].float() @ parts["A"].float()
