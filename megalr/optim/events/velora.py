"""The directions that VeLoRA's layers project their inputs on: the mean of their first update's, on all ranks."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from megalr.layers.velora import VeloraLinear
from megalr.layout.rectangles import Entry
from megalr.optim.events.base import LayerEvents


class Directions(LayerEvents):
    """Gives each layer its direction at the end of the first update that it is used in; then there is nothing to do."""

    key: ClassVar[str] = "activations"
    needs_layout: ClassVar[bool] = False  # a direction is needed by the next forward pass

    def __init__(self, layers: Mapping[str, VeloraLinear]) -> None:
        """
        Args:
            layers: the model's, by qualified name.
        """
        self.remainders: dict[str, Tensor] = {}
        self._layers = dict(layers)
        self.forget_gradients()  # what was made before there was an optimizer belongs to no update

    def end_update(self, updates: int) -> list[int]:
        for layer in self._layers.values():
            if layer.direction is None and layer.weight.requires_grad:
                # An input that has come by one rank's layer alone makes a direction for all of them.
                size = layer.in_features // layer.groups
                own = torch.zeros(size, device=self._device()) if layer.total is None else layer.total
                total, layer.total = self._exchange.sum(own), None
                if total.any() and total.isfinite().all():  # else it waits for the first update in which there is one
                    layer.direction = functional.normalize(total, dim=0)
        return []

    def forget_gradients(self) -> None:
        for layer in self._layers.values():
            layer.total = None

    def numbers(self) -> dict[str, Any]:
        return {}

    def load_numbers(self, numbers: Mapping[str, Any]) -> None:
        pass

    def entries(self) -> dict[str, Entry]:
        known = {name: layer.direction for name, layer in self._layers.items() if layer.direction is not None}
        return {f"directions/{name}": Entry.of(direction) for name, direction in known.items()}

    def make_room(self, saved: Collection[str]) -> None:
        for name, layer in self._layers.items():
            size = layer.in_features // layer.groups
            known = f"directions/{name}" in saved
            layer.direction = torch.empty(size, device=layer.weight.device) if known else None
            layer.total = None

    def _device(self) -> torch.device:
        return next(iter(self._layers.values())).weight.device
