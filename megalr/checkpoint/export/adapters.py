"""LoRA's factors as the peft library reads them, beside the model that they are added to."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

import torch

from megalr.checkpoint.export.folder import ADAPTERS, BASE
from megalr.checkpoint.export.huggingface import empty_model_of, write_model
from megalr.checkpoint.export.weights import Weights, cast
from megalr.errors import UserError
from megalr.layers.base import ParametrizationConfig
from megalr.layers.lora import LoraConfig

PREFIX = "base_model.model"  # peft's, of every name in the model


def write_adapters(weights: Weights, folder: Path, out: Path, dtype: torch.dtype) -> None:
    """``adapter_config.json`` and ``adapter_model.safetensors``, and the base model in a folder beside them.

    The base has W0 in the adapted layers and what was trained everywhere else.

    Args:
        weights: of the checkpoint.
        folder: to write to.
        out: where that will be in the end; the configuration names the base model by its whole path.
        dtype: of adapters and base.

    Raises:
        UserError: the parametrization is not LoRA's, or there is no model's configuration.
    """
    from safetensors.torch import save_file  # noqa: PLC0415

    config = _lora(weights.parametrization)
    known = set(weights)
    layers = {name.removesuffix(".B") for name in known if name.endswith(".B")}
    layers = {layer for layer in layers if all(f"{layer}.{part}" in known for part in config.parts)}
    factors = {f"{layer}.{factor}": f"{PREFIX}.{layer}.lora_{factor}.weight" for layer in layers for factor in "AB"}
    base = {name: cast(name, weights[name], dtype) for name in (*weights, *weights.aliases) if name not in factors}
    write_model(empty_model_of(weights.manifest), base, folder / BASE, dtype)
    adapters = {theirs: cast(ours, weights[ours], dtype) for ours, theirs in sorted(factors.items())}
    save_file(adapters, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    alpha = config.scale * config.rank
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str((out / BASE).resolve()),
        "r": config.rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "target_modules": _targets(layers, [name.removesuffix(".weight") for name in base if name.endswith(".weight")]),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "inference_mode": True,
    }
    (folder / ADAPTERS).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _lora(config: ParametrizationConfig) -> LoraConfig:
    # A class derived from LoRA's may compute something else.
    if isinstance(config, LoraConfig) and type(config).weight is LoraConfig.weight:
        return config
    raise UserError(
        f'the checkpoint was trained with the parametrization "{config.type}", and peft\'s LoRA layers can hold "lora" '
        'and "relora": write `--to hf` for a dense model, or `--to safetensors` for the weights as they are'
    )


def _targets(layers: Collection[str], others: Collection[str]) -> list[str]:
    """What peft is to adapt: last parts of names, where those are of no other layer; else whole names."""
    last = {layer.rpartition(".")[2] for layer in layers}
    clash = any(name.rpartition(".")[2] in last for name in others if name not in layers)
    return sorted(layers if clash else last)
