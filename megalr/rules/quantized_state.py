"""The state of a projected Adam in fp32, and with a 4-bit basis and 8-bit moments: one read as the other.

A moment is quantized where its largest magnitudes, ``<key>_max``, stand beside it; a basis, where its ``<side>_step``
does. So a state says itself how it is stored, and every rule with such a state can go on with either.
"""

from __future__ import annotations

from torch import Tensor

from megalr.rules.base import Basis, Shape, State, count, tensor
from megalr.rules.bases import Side
from megalr.rules.projected import ProjectedRule
from megalr.rules.quantization import dequantize_blocks, dequantize_groups, quantize_groups

MOMENTS = {"exp_avg": True, "exp_avg_sq": False}  # whether they have a sign


def fp32_state(rule: ProjectedRule, state: State, shape: Shape) -> State:
    """The fp32 state of an m x n matrix, without what is kept beside basis and moments.

    Tensors that are fp32 already are shared with ``state``, which is left as it is.

    Args:
        rule: one with the rank and the sides of the state.
        state: in fp32 or quantized.
        shape: (m, n).
    """
    plain: State = {"refreshes": count(state, "refreshes"), "step": count(state, "step")}
    for key, signed in MOMENTS.items():
        stored, largest = tensor(state, key), state.get(f"{key}_max")
        plain[key] = dequantize_blocks(stored, largest, signed=signed) if isinstance(largest, Tensor) else stored
    return plain | {side: fp32_basis(rule, state, shape, side) for side in rule.sides(shape)}


def fp32_basis(rule: ProjectedRule, state: State, shape: Shape, side: Side) -> Tensor:
    """P, (m, r), or Q, (n, r), in fp32."""
    if f"{side}_step" not in state:
        return tensor(state, side)
    levels = tensor(state, side), tensor(state, f"{side}_step"), tensor(state, f"{side}_zero")
    size = shape[0] if side == "left" else shape[1]
    return dequantize_groups(*levels, (rule.rank_of(shape), size)).T


def packed_basis(side: Side, basis: Tensor) -> Basis:
    """The entries of a quantized state that stand for P or Q."""
    packed, step, zero = quantize_groups(basis.T)  # a group is of one vector, or of few
    return {side: packed, f"{side}_step": step, f"{side}_zero": zero}
