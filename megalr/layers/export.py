"""From a parametrization's tensors back to ordinary dense weights, under the dense model's names."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from megalr.errors import UserError
from megalr.layers.base import FullConfig, Parametrization, ParametrizationConfig


def densify(state: Mapping[str, Tensor], config: ParametrizationConfig) -> dict[str, Tensor]:
    """A state dict in which the parts of each replaced layer ``x`` have become ``x.weight``.

    Args:
        state: fp32 (or other) tensors by qualified name; not modified.
        config: the parametrization that the model was trained with.

    Returns:
        The weights in fp32 (multiplied in fp32 and not yet cast), everything else as it is.

    Raises:
        UserError: the parametrization computes what no dense weight does, parts of a replaced layer are missing, or
            finite parts have a weight that is not finite.
    """
    if isinstance(config, FullConfig):
        return dict(state)
    if config.not_dense:
        raise UserError(f'"{config.type}" layers have no dense weight: {config.not_dense}')
    dense: dict[str, Tensor] = {}
    for name, tensor in state.items():
        layer, _, last = name.rpartition(".")
        if last not in config.parts:
            dense[name] = tensor
        elif missing := sorted(part for part in config.parts if f"{layer}.{part}" not in state):
            if last != "weight" and _is_target(layer, config):
                raise UserError(
                    f'{name} has no {layer}.{missing[0]} beside it, and the dense weight of a "{config.type}" layer is '
                    "made of both: these weights are not of one whole model, as where megalr.build_optimizer was given "
                    "a part of it"
                )
            dense[name] = tensor
        elif f"{layer}.weight" not in dense:
            dense[f"{layer}.weight"] = _multiplied(layer, {p: state[f"{layer}.{p}"] for p in config.parts}, config)
    return dense


def _multiplied(layer: str, parts: Mapping[str, Tensor], config: Parametrization) -> Tensor:
    weight = config.weight(parts)
    if not weight.isfinite().all() and all(part.isfinite().all() for part in parts.values()):
        raise UserError(f"{layer}.weight, multiplied in {weight.dtype}, is not finite, though its parts are")
    return weight


def _is_target(layer: str, config: Parametrization) -> bool:
    """Whether a layer may have been replaced; what a user's own layers have may be called A or B as well."""
    patterns = config.target_modules
    return bool(re.search(patterns, layer)) if isinstance(patterns, str) else any(p in layer for p in patterns)
