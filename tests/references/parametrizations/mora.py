"""MoRA, arXiv 2405.12130: a square matrix between fixed maps."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tests.equality import without_reference
from tests.references.parametrizations.common import LAYERS, RESET, Plain, case


class Mora(Plain):
    """arXiv 2405.12130: W = W0 + D M C of equation 6 (type 1), and with rotations, equations 9 and 10 (type 6)."""

    type_name = "mora"
    trained = ("M",)

    def __init__(self, name: str, start: dict[str, Tensor], section: dict[str, Any]) -> None:
        super().__init__(name, start, section)
        self.W0 = start["weight"].detach().clone()

    def dense(self) -> Tensor:
        m, n = self.W0.shape
        h = math.floor(math.sqrt((m + n) * self.r) + (0.5 if self.section.get("published") else 0.0))
        if self.section.get("mora_type", 6) == 1:
            C = torch.zeros(h, n)
            for place in range(-(-n // h) * h):
                C[place % h, place % n] += 1
            D = torch.zeros(m, h)
            for row in range(m):
                D[row, row % h] = 1
            return self.W0 + D @ self.M @ C
        h = h // 2 * 2
        runs = -(-n // h)
        blocks = []
        for i in range(runs):
            P, R = torch.zeros(h, n), torch.zeros(h, h)
            for j in range(h):
                P[j, (i * h + j) % n] = 1
            for j in range(h // 2):
                angle = i / 10000 ** (2 * j / h)
                R[j, j] = R[j + h // 2, j + h // 2] = math.cos(angle)
                R[j, j + h // 2], R[j + h // 2, j] = -math.sin(angle), math.sin(angle)
            blocks.append(self.M @ R @ P)
        stacked = torch.cat(blocks)
        return self.W0 + torch.cat([stacked] * -(-m // len(stacked)))[:m]


CASES = {
    "mora, shared": case({**LAYERS, "type": "mora", "mora_type": 1, "rank": 3}),
    "mora, rotated": case({**LAYERS, "type": "mora", "rank": 3}, momentum_reset=RESET),
}
# A rule on the factors, which the plain layers do not have.
SETTINGS = {
    "mora, rotated, Muon": without_reference(
        case({**LAYERS, "type": "mora", "rank": 3}, ("Muon", {}), momentum_reset=RESET)
    )
}
