"""Division by norms that holds at every scale: squares neither overflow nor vanish, and nothing is added to a norm."""

from __future__ import annotations

import torch
from torch import Tensor


def unit(matrix: Tensor, dim: int | None = None) -> Tensor:
    """X / ‖X‖, over the whole matrix or along one axis; what is zero stays zero.

    A power of two on X changes no bit of the result, as long as X's entries are not subnormal.

    Args:
        matrix: X, finite; left as it is.
        dim: the axis along which norms are taken; None for one norm.
    """
    scaled = in_units_of_largest(matrix, dim)
    # The largest magnitude is one now, so only a norm of zero is below one.
    norm = torch.linalg.vector_norm(scaled, dim=dim, keepdim=True)
    return scaled.div_(norm.clamp_(min=1.0))


def in_units_of_largest(matrix: Tensor, dim: int | None = None) -> Tensor:
    """X / max|X|, new; what is zero stays zero. A division is exact to the last bit under powers of two.

    Args:
        matrix, dim: as for :func:`unit`.
    """
    largest = torch.linalg.vector_norm(matrix, float("inf"), dim=dim, keepdim=True)
    return matrix / torch.where(largest > 0, largest, 1.0)
