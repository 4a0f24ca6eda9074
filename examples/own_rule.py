"""A rule of your own, in one file: momentum with rows of unit length. It shards, resumes and is compared as ours are.

In the DeepSpeed JSON, or in a method of a benchmark's recipe:
    "optimizer": {"type": "RowNormalizedMomentum", "params": {"lr": 1e-2, "momentum": 0.9}},
    "megalr": {"plugins": ["examples/own_rule.py"]}
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

import megalr
from megalr.rules.base import Rule


@megalr.register_rule("RowNormalizedMomentum")
@dataclass(frozen=True, kw_only=True)
class RowNormalizedMomentum(Rule):
    """M = μ M + (1-μ) G, update = M with rows divided by their norms. State of an m x n matrix: M, m x n, fp32."""

    name: ClassVar[str] = "row_normalized_momentum"
    reset_keys: ClassVar[tuple[str, ...]] = ("momentum_buffer",)  # what "momentum_reset" makes zero

    momentum: float = 0.9  # a key of "params"

    def init_state(self, shape, device="cpu"):
        return {"momentum_buffer": torch.zeros(shape, device=device)}

    def update(self, grad, state, basis):  # grad  # (m, n), whole, however ZeRO has cut it
        momentum = state["momentum_buffer"].lerp_(grad, 1 - self.momentum)
        return momentum / momentum.norm(dim=1, keepdim=True).clamp_min(1e-12)

    def state_numel(self, shape):
        return shape[0] * shape[1]

    def flops(self, shape):
        return 6.0 * shape[0] * shape[1]
