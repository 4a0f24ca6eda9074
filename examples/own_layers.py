"""Layers of your own, in one file: W = diag(s) B A, low-rank with a gain for each output. They shard and resume.

JSON: "megalr": {"parametrization": {"type": "gained_low_rank", "rank": 64}, "plugins": ["examples/own_layers.py"]}
"""

from dataclasses import dataclass

from torch import nn

import megalr
from megalr.layers.base import FactorizedLinear, Parametrization
from megalr.layers.low_rank import normal_, root_mean_square


@megalr.register_parametrization("gained_low_rank")
@dataclass(frozen=True, kw_only=True)
class GainedConfig(Parametrization):  # annotated fields would be keys of "parametrization", as "rank" is
    parts = frozenset({"s", "B", "A"})  # what makes up the weight of a layer
    not_refactorized = "has a gain beside them"  # the reason that an error gives

    def replace(self, layer, *, seed, name):  # B A starts with the dense layer's variance
        new, w = GainedLinear(layer, self.rank), layer.weight
        for key in () if w.is_meta else new.factors:
            normal_(getattr(new, key), (root_mean_square(w, name) / self.rank**0.5) ** 0.5, seed, f"{name}.{key}")
        return new

    def weight(self, parts):  # (m, n), fp32, for the export to a dense model
        return parts["s"].float()[:, None] * (parts["B"].float() @ parts["A"].float())


class GainedLinear(FactorizedLinear):
    factors = ("B", "A")  # trained in the weight's place; s is trained as norms are, by AdamW without weight decay

    def __init__(self, dense, rank):
        super().__init__()
        (m, n), self.bias = dense.weight.shape, dense.bias
        self.s, self.B, self.A = (nn.Parameter(dense.weight.new_ones(s)) for s in (m, (m, rank), (rank, n)))

    def forward(self, x):  # (..., n)
        return nn.functional.linear(x @ self.A.T, self.s[:, None] * self.B, self.bias)
