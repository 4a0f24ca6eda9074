"""Whether gradients are finite, at the speed of memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether all elements of all tensors, none of them empty, are finite."""
    # The 2-norm runs at the speed of memory, the maximum norm on a CPU at a twentieth of it; but squares can overflow.
    for order in (2.0, float("inf")):
        norms = torch._foreach_norm(list(tensors), order) if tensors else [torch.zeros(())]
        if torch.isfinite(torch.stack([norm.to(norms[0]) for norm in norms])).all():
            return True
    return False
