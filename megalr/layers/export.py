"""From a parametrization's tensors back to ordinary dense weights, under the dense model's names."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from megalr.errors import UserError
from megalr.layers.base import FullConfig, ParametrizationConfig


def densify(state: Mapping[str, Tensor], config: ParametrizationConfig) -> dict[str, Tensor]:
    """A state dict in which the parts of each replaced layer ``x`` have become ``x.weight``.

    Args:
        state: fp32 (or other) tensors by qualified name; not modified.
        config: the parametrization that the model was trained with.

    Returns:
        The weights in fp32 (multiplied in fp32 and not yet cast), everything else as it is.

    Raises:
        UserError: the parametrization computes what no dense weight does.
    """
    if isinstance(config, FullConfig):
        return dict(state)
    if config.not_dense:
        raise UserError(f'"{config.type}" layers have no dense weight: {config.not_dense}')
    dense: dict[str, Tensor] = {}
    for name, tensor in state.items():
        layer, _, last = name.rpartition(".")
        if last not in config.parts or any(f"{layer}.{part}" not in state for part in config.parts):
            dense[name] = tensor
        elif f"{layer}.weight" not in dense:
            dense[f"{layer}.weight"] = config.weight({part: state[f"{layer}.{part}"] for part in config.parts})
    return dense
