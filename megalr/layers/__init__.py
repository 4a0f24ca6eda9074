"""Parametrizations of a linear layer's weight."""

from megalr.layers.export import densify
from megalr.layers.low_rank import LowRankLinear
from megalr.layers.projected import ProjectedLinear
from megalr.layers.replacement import factor_names, factor_pairs, matching, parametrize, projected_layers
from megalr.layers.sltrain import SLTrainLinear

__all__ = [
    "LowRankLinear",
    "ProjectedLinear",
    "SLTrainLinear",
    "densify",
    "factor_names",
    "factor_pairs",
    "matching",
    "parametrize",
    "projected_layers",
]
