"""Dense models as transformers reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalr.checkpoint.manifest import Manifest
from megalr.errors import UserError
from megalr.train.export import save_filled


def write_model(manifest: Manifest, state: dict[str, Tensor], folder: Path, dtype: torch.dtype) -> None:
    """A folder that ``from_pretrained`` reads.

    Args:
        manifest: of the checkpoint, which has the model's configuration.
        state: the dense weights.
        folder: to write to.
        dtype: of the model.

    Raises:
        UserError: the checkpoint has no configuration, or the weights are not those of such a model.
    """
    save_filled(_empty_model(manifest), state, folder, dtype)


def _empty_model(manifest: Manifest) -> Any:
    """The model on the meta device."""
    import transformers  # noqa: PLC0415  (slow to import)

    values = manifest.content["model"]
    instead = "`--to safetensors --dense` writes dense weights without one"
    if values is None:
        raise UserError(
            f"{manifest.folder} is of a model without a configuration of transformers, which a Hugging Face folder "
            f"needs: {instead}"
        )
    name, architectures = values.get("model_type"), values.get("architectures") or [""]
    try:
        kind: Any = transformers.AutoConfig.for_model(name).__class__
        config = kind.from_dict({**values, "use_cache": True})
        model = getattr(transformers, architectures[0], None)
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(config) if model is None else model(config)
    except Exception as error:  # transformers raises errors of many kinds
        raise UserError(f"this transformers cannot build the {name} that was saved: {error}. {instead}") from error
