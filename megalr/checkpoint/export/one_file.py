"""Weights in one safetensors file, as they were trained or dense."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalr.checkpoint.export.weights import Weights
from megalr.errors import UserError
from megalr.version import __version__

WEIGHTS_FILE = "model.safetensors"


def write_weights(weights: Weights, folder: Path, dtype: torch.dtype, *, dense: bool) -> None:
    """Write one safetensors file.

    Its metadata say what the weights are. For each further name of a shared parameter they hold the first name, as
    ``safetensors.torch.save_model`` does, so that ``safetensors.torch.load_model`` reads the file into a parametrized
    model.

    Args:
        weights: of the checkpoint.
        folder: to write to.
        dtype: of floating-point weights.
        dense: multiply out what a parametrization trains.

    Raises:
        UserError: what would be written as dense is not what the dense model has.
    """
    from safetensors.torch import save_file  # noqa: PLC0415

    state = weights.dense(dtype) if dense else weights.as_trained(dtype)
    if dense:
        _check_dense(weights, state)
    shared = {alias: name for alias, name in weights.aliases.items() if name in state}
    state = {name: tensor.contiguous() for name, tensor in state.items() if name not in shared}
    save_file(state, folder / WEIGHTS_FILE, metadata={**shared, **_metadata(weights, state, dense=dense)})


def _check_dense(weights: Weights, state: dict[str, Tensor]) -> None:
    """Hold dense weights against the model, where the checkpoint says which that is."""
    from megalr.checkpoint.export.huggingface import empty_model_of, fill  # noqa: PLC0415  (imports transformers)

    if weights.manifest.content["model"] is None:
        return
    try:
        model = empty_model_of(weights.manifest)
    except UserError:
        return  # this transformers does not know it, and the file serves those whom it does not help
    fill(model, state)


def _metadata(weights: Weights, state: Mapping[str, Tensor], *, dense: bool) -> dict[str, str]:
    described: Any = {"type": "full"} if dense else weights.section
    return {
        "format": "pt",
        "megalr": __version__,
        "updates": str(weights.manifest.updates),
        "parametrization": json.dumps(described),
        "parameters": str(sum(tensor.numel() for tensor in state.values())),
    }
