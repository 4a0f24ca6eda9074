"""Tensor parallelism of the layers that megalr makes; dense ones are DeepSpeed's AutoTP's.

A column-parallel layer has rows of B and a copy of A, a row-parallel one columns of A and a copy of B: what crosses
the network is r wide, once a layer, forward or backward.
"""

from megalr.parallel.layers import cut_layers
from megalr.parallel.plan import (
    check_heads,
    check_neighbours,
    check_section,
    check_tensor_parallel,
    planned_cuts,
    start_tensor_parallel,
    tensor_parallel_size,
)

__all__ = [
    "check_heads",
    "check_neighbours",
    "check_section",
    "check_tensor_parallel",
    "cut_layers",
    "planned_cuts",
    "start_tensor_parallel",
    "tensor_parallel_size",
]
