"""VeLoRA: compressed activations, the input of a linear layer saved as rank-1 parts, arXiv 2405.17991.

x of n elements is cut into ``groups`` sub-tokens, and of each its length along one fixed unit vector v is saved, so
``groups`` numbers instead of n. The backward pass takes x̂, these lengths times v, for x in the weight's gradient dyᵀ x̂;
the gradient of x is exact, and so is the forward pass. The weight is a whole matrix as before, for any rule.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from megalr.errors import UserError
from megalr.layers.replaceable import check_replaceable
from megalr.layers.replacement import matching
from megalr.naming import named_modules, submodule
from megalr.schema import check_targets, require


@dataclass(frozen=True, kw_only=True)
class VeloraConfig:
    """The JSON's "activations": what is saved of the inputs of linear layers.

    Attributes:
        type: its name in the JSON.
        target_modules: linear layers to compress, named as for a parametrization; the published ones by default.
        groups: number of parts of a token; it has to divide the width of each layer's input. The gradient of a weight
            has at most this rank.
        scale: factor on the gradients of the weights.
    """

    type: Literal["velora"] = "velora"
    target_modules: tuple[str, ...] | str = ("v_proj", "down_proj")
    groups: int = 32
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_targets(self.target_modules, "megalr.activations.target_modules")
        require(self.groups >= 1, f"megalr.activations.groups is {self.groups}; write a whole number of at least 1")
        require(self.scale > 0, f"megalr.activations.scale is {self.scale}; write a positive number")

    def form(self) -> dict[str, str | int | bool]:
        """What decides what is kept with the optimizer's state."""
        return {"activations": self.type, "groups": self.groups}


def compress_activations(model: nn.Module, config: VeloraConfig) -> nn.Module:
    """Have the linear layers that ``config.target_modules`` names save compressed inputs, in place.

    Raises:
        UserError: a pattern matches nothing, an input cannot be cut so, or a layer has more than a replacement takes
            over (:mod:`megalr.layers.replaceable`).
    """
    linear = {name: module for name, module in named_modules(model) if type(module) is nn.Linear}
    where = "megalr.activations.target_modules"
    names = matching(linear, config.target_modules, where, "linear layer with a weight of its own")
    check_replaceable({n: layer for n, layer in linear.items() if n in names}, where, keeps_weight=True)
    for name, layer in linear.items():
        size = layer.in_features
        if name in names and size % config.groups:
            fitting = [g for g in range(1, config.groups + 1) if size % g == 0]
            raise UserError(
                f"megalr.activations.groups is {config.groups}, which does not divide the {size} inputs of {name}: "
                f"write {fitting[-1]}, or another of their divisors"
            )
    for name in sorted(names):
        parent, _, child = name.rpartition(".")
        setattr(submodule(model, parent), child, VeloraLinear(linear.pop(name), config))
    return model


def compressed_layers(model: nn.Module) -> dict[str, VeloraLinear]:
    """The layers of the model that save compressed inputs, by qualified name, in its order."""
    return dict(_compressed(model))


def _compressed(model: nn.Module) -> Iterator[tuple[str, VeloraLinear]]:
    for name, module in named_modules(model):
        if isinstance(module, VeloraLinear):
            yield name, module


class VeloraLinear(nn.Linear):
    """``nn.Linear`` that saves ``groups`` numbers for each token, once it has a direction.

    v is the mean of the sub-tokens of the first update that the layer is used in, over all ranks and micro-batches,
    normalized; the published code takes the first micro-batch of each process. Until then x is saved whole.

    Attributes:
        direction: v, (in_features / groups,), fp32; None before that update is over.
        total: the sum of this rank's sub-tokens in backward passes so far, while there is no direction.
    """

    def __init__(self, layer: nn.Linear, config: VeloraConfig) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight = layer.weight
        self.register_parameter("bias", layer.bias)
        self.groups, self.scale = config.groups, config.scale
        self.direction: Tensor | None = None
        self.total: Tensor | None = None
        self.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to x of shape (..., in_features)."""
        if not (self.training and torch.is_grad_enabled() and self.weight.requires_grad):
            return functional.linear(x, self.weight, self.bias)
        if self.direction is None:
            first: Tensor = _Noted.apply(functional.linear(x, self.weight, self.bias), x.detach(), self)
            return first
        if torch.is_autocast_enabled(x.device.type) and x.is_floating_point():
            x = x.to(torch.get_autocast_dtype(x.device.type))
        with torch.autocast(x.device.type, enabled=False):
            y: Tensor = _Compressed.apply(x, self.weight, self.bias, self)
        return y

    def add(self, x: Tensor) -> None:
        """Add the sub-tokens of x, (..., in_features), to the total."""
        parts = x.reshape(-1, self.in_features // self.groups).sum(0, dtype=torch.float32)
        self.total = parts if self.total is None else self.total + parts

    def extra_repr(self) -> str:
        """What ``print(model)`` shows of this layer."""
        return f"{super().extra_repr()}, groups={self.groups}"


class _Noted(torch.autograd.Function):
    """Hands on y, and adds its x to the layer's total when a gradient comes by: what has none belongs to no update."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, layer: VeloraLinear) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x)
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        layer: VeloraLinear = ctx.layer
        if layer.direction is None:
            layer.add(ctx.saved_tensors[0])
        return grads[0], None, None


class _Compressed(torch.autograd.Function):
    """The layer's two passes. The weight is read from the layer, not saved: ZeRO-3 takes it away in between."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: VeloraLinear) -> Tensor:
        assert layer.direction is not None
        ctx.layer = layer
        v = layer.direction.to(x)
        ctx.save_for_backward(x.reshape(-1, layer.groups, v.numel()) @ v)  # (tokens, groups)
        return functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        layer: VeloraLinear = ctx.layer
        (lengths,) = ctx.saved_tensors
        assert layer.direction is not None
        dy = grads[0].reshape(-1, layer.out_features)
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = (dy @ layer.weight.to(dy.dtype)).view(*grads[0].shape[:-1], layer.in_features)
        if ctx.needs_input_grad[1]:
            # dyᵀ x̂ = (dyᵀ lengths) ⊗ v: x̂ itself is never formed.
            low = dy.T @ lengths * layer.scale  # (m, groups)
            dw = (low[:, :, None] * layer.direction.to(dy)).view(layer.out_features, layer.in_features)
            dw = dw.to(layer.weight.dtype)
        if ctx.needs_input_grad[2] and layer.bias is not None:
            db = dy.sum(0).to(layer.bias.dtype)
        return dx, dw, db, None
