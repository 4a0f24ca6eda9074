"""CoLA, arXiv 2502.10940: an activation between the factors."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.equality import without_reference
from tests.references.parametrizations.common import LAYERS, RESET, Plain, case


class Cola(Plain):
    """arXiv 2502.10940, equation 3: y = B silu(A x)."""

    type_name = "cola"
    trained = ("B", "A")

    def forward(self, x: Tensor) -> Tensor:
        a = x @ self.A.T
        y = a * torch.sigmoid(a) @ self.B.T
        return y if self.bias is None else y + self.bias

    def exported(self) -> dict[str, Tensor]:
        return {"B": self.B, "A": self.A}


CASES = {"cola": case({"type": "cola", **LAYERS}, momentum_reset=RESET)}
# A rule on the factors, which the plain layers do not have.
SETTINGS = {"cola, Muon": without_reference(case({"type": "cola", **LAYERS}, ("Muon", {}), momentum_reset=RESET))}
