"""``export``: write a model of a checkpoint's weights, for other programs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

import torch

from megalr.checkpoint.export.folder import check_output, output_folder, save_tokenizer
from megalr.checkpoint.export.weights import Weights
from megalr.checkpoint.folders import whole_checkpoint
from megalr.checkpoint.manifest import Manifest, check_same
from megalr.errors import UserError

Form = Literal["hf", "safetensors", "peft"]
DTYPE_NAMES = ("float32", "bfloat16", "float16")


@torch.no_grad()
def export(
    place: Path,
    out: Path,
    form: Form,
    *,
    dtype: str | None = None,
    dense: bool = False,
    tokenizer: Any = None,
    overwrite: bool = False,
) -> None:
    """Write a model, and say where.

    Args:
        place: a checkpoint's folder, or the directory of several, of which the newest intact one is used.
        out: the folder to write to.
        form: "hf" is a dense model as transformers reads it, "safetensors" one file of weights, "peft" adapters.
        dtype: one of :data:`DTYPE_NAMES`; None for the one that the model computed with.
        dense: with "safetensors": dense weights instead of a parametrization's.
        tokenizer: one of transformers to save with the model.
        overwrite: whether an earlier export may be replaced.

    Raises:
        UserError: the checkpoint is damaged, is not there, was replaced by another save while it was read, or cannot be
            written in that form.
    """
    manifest, skipped = whole_checkpoint(place)
    for line in skipped:
        print(f"passed over: {line}", file=sys.stderr)
    weights, name = Weights(manifest), dtype or _computed_with(manifest)
    as_dtype = getattr(torch, name)
    check_output(out, may_replace=overwrite, checkpoint=manifest.folder)
    with output_folder(out) as folder:
        # Each form imports other libraries, which are slow to import.
        if form == "hf":
            from megalr.checkpoint.export.huggingface import empty_model_of, write_model  # noqa: PLC0415

            write_model(empty_model_of(manifest), weights.dense(as_dtype), folder, as_dtype)
        elif form == "peft":
            from megalr.checkpoint.export.adapters import write_adapters  # noqa: PLC0415

            write_adapters(weights, folder, out, as_dtype)
        else:
            from megalr.checkpoint.export.one_file import write_weights  # noqa: PLC0415

            write_weights(weights, folder, as_dtype, dense=dense)
        if tokenizer is not None:
            save_tokenizer(tokenizer, folder)
        check_same(manifest)  # before anything gets its name
    print(f"{out}: {form}, {name}, of {manifest.folder} ({manifest.updates:,} updates)")


def _computed_with(manifest: Manifest) -> str:
    name: str = manifest.content["layout"]["dtype"]
    if name not in DTYPE_NAMES:
        raise UserError(f"the model computed with {name}: choose a --dtype of {', '.join(DTYPE_NAMES)}")
    return name
