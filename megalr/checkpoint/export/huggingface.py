"""Dense models as transformers reads them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalr.checkpoint.export.weights import cast, check_model
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
        UserError: weights are missing, the model has no such weights, or a value is too large for the dtype.
    """
    fill(model, {name: cast(name, tensor, dtype) for name, tensor in state.items()})
    model.to(dtype).save_pretrained(folder)


def fill(model: Any, state: dict[str, Tensor]) -> None:
    """Give an empty model its weights, the same tensors.

    Weights that the model's configuration ties although they differ, as those of a head of its own, are not tied, and
    the configuration says so from then on.

    Args:
        model, state: see :func:`write_model`.

    Raises:
        UserError: weights are missing, are too many, or have other shapes; or the model cannot hold them all.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    wrong = [n for n, t in state.items() if n in expected and tuple(t.shape) != expected[n]]
    if wrong:
        found = tuple(state[wrong[0]].shape)
        raise UserError(f"cannot export: {wrong[0]} is {found}, and the dense model has {expected[wrong[0]]}")
    _, unexpected = model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    if _overwritten(model, state):
        for module in model.modules():
            if getattr(getattr(module, "config", None), "tie_word_embeddings", False):
                module.config.tie_word_embeddings = False
        model.load_state_dict(state, strict=False, assign=True)
        model.tie_weights()
    missing = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if unexpected or missing:
        raise UserError(f"cannot export a dense model: weights missing {missing}, weights too many {unexpected}")
    if lost := _overwritten(model, state):
        raise UserError(
            f"cannot export a dense model: transformers ties {lost[0]} to another weight of {type(model).__name__}, "
            "from which it differs. `--to safetensors` writes both"
        )


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


def _overwritten(model: Any, state: Mapping[str, Tensor]) -> list[str]:
    """Names of weights that a model does not have as they were given."""
    found = {name: tensor for name, tensor in model.state_dict().items() if name in state}
    # Most are the same tensors, which nothing has to be read of.
    return [n for n, t in found.items() if t.data_ptr() != state[n].data_ptr() and not torch.equal(t, state[n])]


def _class_of(config: Any) -> Any:
    """The class of transformers' models that a configuration names, if it is one for such configurations."""
    import transformers  # noqa: PLC0415

    name = next(iter(config.architectures or ()), None)
    found: Any = getattr(transformers, name, None) if isinstance(name, str) else None
    is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    return found if is_model and isinstance(config, found.config_class or ()) else None
