"""LoRA, arXiv 2106.09685, from random weights."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tests.equality import without_reference
from tests.references.parametrizations.common import LAYERS, REFACTORIZATION, case
from tests.references.parametrizations.low_rank import LowRank


class Lora(LowRank):
    """arXiv 2106.09685, equation 3: W = W0 + s B A."""

    type_name = "lora"

    def __init__(self, name: str, start: dict[str, Tensor], section: dict[str, Any]) -> None:
        super().__init__(name, start, section)
        self.W0 = start["weight"].detach().clone()

    def dense(self) -> Tensor:
        return self.W0 + self.product()


CASES = {
    "lora": case({"type": "lora", "alpha": 10.0, **LAYERS}),
    "lora, refactorized": case({"type": "lora", **LAYERS}, refactorization=REFACTORIZATION),
}
# A rule on the factors, which the plain layers do not have.
SETTINGS = {
    "lora, refactorized, Muon": without_reference(
        case({"type": "lora", **LAYERS}, ("Muon", {}), refactorization=REFACTORIZATION)
    )
}
