"""``export``: a model of a checkpoint's weights, for other programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from megalr.checkpoint.folders import whole_checkpoint
from megalr.checkpoint.manifest import Manifest
from megalr.checkpoint.outputs import output_folder
from megalr.checkpoint.weights import Weights
from megalr.errors import UserError
from megalr.train.quiet import quieten
from megalr.version import __version__

Form = Literal["hf", "safetensors", "peft"]
DTYPE_NAMES = ("float32", "bfloat16", "float16")
WEIGHTS_FILE = "model.safetensors"


@torch.no_grad()
def export(
    place: Path,
    out: Path,
    form: Form,
    *,
    dtype: str | None = None,
    dense: bool = False,
    tokenizer: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write a model, and say where.

    Args:
        place: a checkpoint's folder, or the directory of several, of which the newest that is whole is taken.
        out: the folder to write to.
        form: "hf" is a dense model as transformers reads it, "safetensors" one file of weights, "peft" adapters.
        dtype: one of :data:`DTYPE_NAMES`; None for the one that the model computed with.
        dense: with "safetensors": dense weights in the place of a parametrization's.
        tokenizer: a name or a path of one to be saved with the model.
        overwrite: whether an export that is there may be replaced.

    Raises:
        UserError: the checkpoint is damaged, cannot be written in that form, or not there.
    """
    quieten(first=True)
    manifest, skipped = whole_checkpoint(place)
    for line in skipped:
        print(f"passed over: {line}", file=sys.stderr)
    weights, name = Weights(manifest), dtype or _computed_with(manifest)
    as_dtype = getattr(torch, name)
    with output_folder(out, manifest.folder, may_replace=overwrite) as folder:
        if form == "hf":
            from megalr.checkpoint.huggingface import write_model  # noqa: PLC0415  (transformers is slow to import)

            write_model(manifest, weights.dense(as_dtype), folder, as_dtype)
        elif form == "peft":
            from megalr.checkpoint.adapters import write_adapters  # noqa: PLC0415

            write_adapters(weights, folder, out, as_dtype)
        else:
            write_weights(weights, folder, as_dtype, dense=dense)
        if tokenizer is not None:
            from megalr.data.tokenizer import load_tokenizer  # noqa: PLC0415

            load_tokenizer(tokenizer).save_pretrained(folder)
    print(f"{out}: {form}, {name}, of {manifest.folder} ({manifest.updates:,} updates)")


def write_weights(weights: Weights, folder: Path, dtype: torch.dtype, *, dense: bool) -> None:
    """One safetensors file.

    Its metadata say what the weights are, and name the first name of every other name of a shared parameter, as
    ``safetensors.torch.save_model`` has it: ``safetensors.torch.load_model`` reads it into a parametrized model.

    Args:
        weights: of the checkpoint.
        folder: to write to.
        dtype: of floating-point weights.
        dense: multiply out what a parametrization trains.
    """
    from safetensors.torch import save_file  # noqa: PLC0415

    state = weights.dense(dtype) if dense else weights.as_trained(dtype)
    shared = {alias: name for alias, name in weights.aliases.items() if name in state}
    state = {name: tensor.contiguous() for name, tensor in state.items() if name not in shared}
    save_file(state, folder / WEIGHTS_FILE, metadata={**shared, **_metadata(weights, state, dense=dense)})


def _metadata(weights: Weights, state: Mapping[str, Tensor], *, dense: bool) -> dict[str, str]:
    described: Any = {"type": "full"} if dense else weights.section
    return {
        "format": "pt",
        "megalr": __version__,
        "updates": str(weights.manifest.updates),
        "parametrization": json.dumps(described),
        "parameters": str(sum(tensor.numel() for tensor in state.values())),
    }


def _computed_with(manifest: Manifest) -> str:
    name: str = manifest.content["layout"]["dtype"]
    if name not in DTYPE_NAMES:
        raise UserError(f"the model computed with {name}: choose a --dtype of {', '.join(DTYPE_NAMES)}")
    return name
