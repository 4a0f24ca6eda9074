"""From factors back to ordinary dense weights, under the dense model's names."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megalr.config import LowRankConfig, ParametrizationConfig


def densify(state: Mapping[str, Tensor], config: ParametrizationConfig) -> dict[str, Tensor]:
    """A state dict in which every pair ``x.B``, ``x.A`` is replaced by ``x.weight`` = (alpha / rank) * B @ A.

    Args:
        state: fp32 (or other) tensors by qualified name; not modified.
        config: the parametrization that the model was trained with.

    Returns:
        The products in fp32 (multiplied in fp32 and not yet cast), everything else as it is.
    """
    if not isinstance(config, LowRankConfig):
        return dict(state)
    dense: dict[str, Tensor] = {}
    for name, tensor in state.items():
        layer, _, last = name.rpartition(".")
        if last == "A" and f"{layer}.B" in state:
            continue
        if last == "B" and f"{layer}.A" in state:
            product = config.scale * (tensor.to(torch.float32) @ state[f"{layer}.A"].to(torch.float32))
            dense[f"{layer}.weight"] = product
        else:
            dense[name] = tensor
    return dense
