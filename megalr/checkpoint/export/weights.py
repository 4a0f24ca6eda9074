"""The model in a checkpoint: its weights as they were trained, or dense."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megalr.checkpoint.manifest import MANIFEST, Manifest
from megalr.checkpoint.reading import keys_of, read_tensor
from megalr.config.settings import MegalrConfig
from megalr.errors import UserError, printable
from megalr.layers.base import ParametrizationConfig
from megalr.layers.export import densify
from megalr.layers.registry import PARAMETRIZATIONS
from megalr.plugins import load_plugins, unknown_method


class Weights:
    """Trained weights from the fp32 masters, frozen ones and buffers as they are; read when they are asked for.

    Attributes:
        manifest: of the checkpoint.
        aliases: further names of shared parameters, and the first name of each.
        parametrization: that the model was trained with.
        section: the same as the JSON has it.
    """

    def __init__(self, manifest: Manifest) -> None:
        """
        Args:
            manifest: of a checkpoint whose files have been checked.

        Raises:
            UserError: the parametrization is a plugin's that has not been loaded.
        """
        self.manifest = manifest
        self.aliases: Mapping[str, str] = manifest.content["numbers"].get("names", {})
        self._keys = {name: key for key, name in keys_of(manifest, "weights", "frozen", "buffers")}
        self._shapes: Mapping[str, list[int]] = manifest.content["numbers"].get("shapes", {})
        self.section, self.parametrization = _parametrization(manifest)

    def __iter__(self) -> Iterator[str]:
        """Names, each parameter's first."""
        return iter(self._keys)

    def __getitem__(self, name: str) -> Tensor:
        """A parameter or buffer, whole, on the CPU, under any of its names."""
        shape = self.shape(name)
        return read_tensor(self.manifest, self._keys[self.aliases.get(name, name)]).view(shape)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a parameter or buffer, without reading it.

        Raises:
            UserError: the checkpoint lacks it, or says two things of it.
        """
        first = self.aliases.get(name, name)
        if first not in self._keys:
            raise UserError(f"{self.manifest.folder} lacks {printable(first)}, which it names")
        stored = self.manifest.shapes[self._keys[first]]
        shape = tuple(self._shapes.get(first, stored))
        if math.prod(shape) != math.prod(stored):
            raise UserError(f"{self.manifest.folder} gives {printable(first)} the shapes {stored} and {shape}")
        return shape

    def state_dict(self) -> dict[str, Tensor]:
        """All by every name: fp32 masters, and others in the dtype that they were trained with."""
        return {name: self[name] for name in (*self._keys, *self.aliases)}

    def as_trained(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """All by their first names; floating-point ones in a dtype; see :func:`cast`."""
        return {name: cast(name, self[name], dtype) for name in self}

    def dense(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """What a dense model has, under all names; multiplied in fp32, then cast.

        Layer by layer, so that the dense model is in memory once, in its dtype.

        Raises:
            UserError: the parametrization computes what no dense weight does, or a value is too large for the dtype.
        """
        layers: dict[str, list[str]] = {}
        for name in (*self._keys, *self.aliases):
            layers.setdefault(name.rpartition(".")[0], []).append(name)
        found: dict[str, Tensor] = {}
        for names in layers.values():
            try:
                parts = densify({name: self[name] for name in names}, self.parametrization)
            except UserError as error:
                raise UserError(f"{error}. `--to safetensors` without --dense writes them as they are") from error
            found |= {name: cast(name, tensor, dtype) for name, tensor in parts.items()}
        return found


def cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Floating-point values in a dtype, others as they are.

    Args:
        name: of the tensor, for the message.
        tensor: of any shape and dtype.
        dtype: to cast to. Values too small for it become zero.

    Raises:
        UserError: a finite value becomes infinite or NaN. Those that already are stay so.
    """
    if not tensor.is_floating_point() or tensor.dtype == dtype:
        return tensor
    found = tensor.to(dtype)
    if not found.isfinite().all() and (too_large := tensor.isfinite() & ~found.isfinite()).any():
        largest = tensor[too_large].abs().max().item()
        finite = [other for other in (torch.bfloat16, torch.float32) if tensor[too_large].to(other).isfinite().all()]
        raise UserError(
            f"cannot export: {printable(name)} has values of up to {largest:.4g}, and the largest "
            f"{_short(dtype)} is {torch.finfo(dtype).max:.4g}. {_instead(finite)}"
        )
    return found


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _instead(dtypes: Sequence[torch.dtype]) -> str:
    """What to write in place of a dtype that cannot hold the weights."""
    if not dtypes:
        return "No dtype of an export can hold them"
    return f"Export the checkpoint with `--dtype {'` or `--dtype '.join(map(_short, dtypes))}`"


def check_model(model: Mapping[str, Any], manifest: Manifest) -> None:
    """Refuse a model's configuration that asks for more layers, labels, ... than the checkpoint has weights for.

    To build a model, be it without memory for weights, takes time and memory for each of them.

    Raises:
        UserError: naming the key.
    """
    tensors = len(manifest.tensors)
    elements = sum(math.prod(shape) for shape in manifest.shapes.values())
    for key, value in model.items():
        layers = key.endswith(("_layers", "n_layer")) and not key.startswith("max_")
        most = tensors if layers else elements if key.startswith(("num_", "n_")) else None
        if most is not None and isinstance(value, int) and value > most:
            raise UserError(
                f"the model's configuration says {printable(key)}: {value:,}, and {manifest.folder} has {tensors:,} "
                f"tensors of {elements:,} elements: it is of another model"
            )


def _parametrization(manifest: Manifest) -> tuple[Mapping[str, str], ParametrizationConfig]:
    section = manifest.content["config"].get("megalr", {})
    chosen = section.get("parametrization") or {"type": "full"}
    load_plugins(())  # of installed packages; those that the checkpoint names are a stranger's code
    kind = chosen.get("type")
    if not isinstance(kind, str) or kind not in PARAMETRIZATIONS:
        raise unknown_method(f"{manifest.folder} was trained with megalr.parametrization.type", kind, section)
    try:
        return chosen, MegalrConfig.from_json({"megalr": {"parametrization": chosen}}).parametrization
    except UserError as error:
        raise UserError(f"{manifest.folder / MANIFEST} does not say how weights are represented: {error}") from error
