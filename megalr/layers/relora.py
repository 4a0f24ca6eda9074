"""ReLoRA: LoRA that merges s B A into W0 at an interval, arXiv 2307.05695."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from megalr.layers.base import MergeRounding
from megalr.layers.lora import LoraConfig
from megalr.schema import check_ramp, require


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
        restart_warmup_steps: updates after a merge in which the learning rate of the factors rises from 0.001 of the
            scheduled rate to all of it; below ``merge_every``. The published code warms up all parameters.
        moments: what happens to the moments of the factors. "magnitude" keeps the largest elements of each factor's
            first and second moments, "random" a random set, and both keep the count; "reset" sets all and the count to
            zero; "keep" leaves all. A first moment becomes zero together with its second moment.
        prune_ratio: share of each factor's moments that becomes zero.
        merge_rounding: how W0 + s B A is rounded into a 16-bit W0; as for projected layers.
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
