"""Dense models as transformers reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalr.checkpoint.export.weights import check_model
from megalr.checkpoint.manifest import Manifest
from megalr.errors import UserError


def write_model(model: Any, state: dict[str, Tensor], folder: Path, dtype: torch.dtype) -> None:
    """Write a folder that ``from_pretrained`` reads.

    Args:
        model: of transformers, on the meta device, see :func:`empty_model_of`; modified.
        state: its dense weights; of tied weights at least one.
        folder: where to write.
        dtype: of the written weights.

    Raises:
        UserError: weights are missing, or the model has no such weights.
    """
    fill(model, state)
    model.to(dtype).save_pretrained(folder)


def fill(model: Any, state: dict[str, Tensor]) -> None:
    """Give an empty model its weights, the same tensors.

    Args:
        model, state: see :func:`write_model`.

    Raises:
        UserError: weights are missing, are too many, or have other shapes.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    wrong = [n for n, t in state.items() if n in expected and tuple(t.shape) != expected[n]]
    if wrong:
        found = tuple(state[wrong[0]].shape)
        raise UserError(f"cannot export: {wrong[0]} is {found}, and the dense model has {expected[wrong[0]]}")
    _, unexpected = model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    missing = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if unexpected or missing:
        raise UserError(f"cannot export a dense model: weights missing {missing}, weights too many {unexpected}")


def empty_model_of(manifest: Manifest) -> Any:
    """The model that a checkpoint is of, on the meta device.

    Raises:
        UserError: the checkpoint has no configuration of transformers, or this transformers cannot build the model.
    """
    import transformers  # noqa: PLC0415  (slow to import)

    values = manifest.content["model"]
    instead = "`--to safetensors --dense` writes dense weights without one"
    if values is None:
        raise UserError(
            f"{manifest.folder} is of a model without a configuration of transformers, which a Hugging Face folder "
            f"needs: {instead}"
        )
    check_model(values, manifest)
    name = values.get("model_type")
    try:
        kind: Any = transformers.AutoConfig.for_model(name).__class__
        config = kind.from_dict({**values, "use_cache": True})
        # A configuration may name code of the hub, which transformers would fetch and run.
        config._attn_implementation = config._experts_implementation = "eager"
        model = _class_of(config)
        with torch.device("meta"):
            if model is not None:
                return model(config)
            return transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # transformers raises errors of many kinds
        raise UserError(f"this transformers cannot build the {name} that was saved: {error}. {instead}") from error


def _class_of(config: Any) -> Any:
    """The class of transformers' models that a configuration names, if it is one for such configurations."""
    import transformers  # noqa: PLC0415

    name = next(iter(config.architectures or ()), None)
    found: Any = getattr(transformers, name, None) if isinstance(name, str) else None
    is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    return found if is_model and isinstance(config, found.config_class or ()) else None
