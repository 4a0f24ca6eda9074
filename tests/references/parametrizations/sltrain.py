"""SLTrain, arXiv 2406.02214: low-rank plus sparse."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.references.parametrizations.common import LAYERS, REFACTORIZATION, RESET, case
from tests.references.parametrizations.low_rank import LowRank


class SLTrain(LowRank):
    """arXiv 2406.02214, equation 2: W = s B A + S, S with values V at the places I."""

    type_name = "sltrain"
    trained = ("B", "A", "values")

    def __init__(self, name: str, start: dict[str, Tensor], section: dict[str, Any]) -> None:
        super().__init__(name, start, section)
        self.I = start["support"].long()

    def dense(self) -> Tensor:
        m, n = self.B.shape[0], self.A.shape[1]
        S = torch.zeros(m * n).index_put((self.I,), self.values).view(m, n)
        return self.product() + S


SPARSE = {"type": "sltrain", "density": 0.1, "init": "variance_matched", **LAYERS}
RESTARTS = {"refactorization": REFACTORIZATION, "momentum_reset": RESET}
CASES = {
    "sltrain": case({"type": "sltrain", "alpha": 10.0, "density": 0.1, **LAYERS}),
    "sltrain, restarts": case(SPARSE, **RESTARTS),
    # Its own resets come before updates 6 and 12, those of the optimizer after 4, 5, 8, 10 and 12.
    "sltrain, Stable-SPAM": case(SPARSE, ("StableSPAM", {"reset_interval": 6, "total_steps": 9}), **RESTARTS),
}
