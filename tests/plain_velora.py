"""A plain linear layer whose weight's gradient is that of arXiv 2405.17991, by autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class PlainVelora(nn.Module):
    """y = x Wᵀ + b with dW = scale · dyᵀ x̂, x̂ the projection of x's sub-tokens on v; v of the first input it sees."""

    def __init__(self, layer: nn.Linear, section: dict[str, Any]) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.size = layer.in_features // section["groups"]
        self.scale = section.get("scale", 1.0)
        self.first: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.first is None:
            self.first = x.detach()
            return functional.linear(x, self.weight, self.bias)
        v = functional.normalize(self.first.reshape(-1, self.size).mean(0), dim=0)
        x_hat = ((x.detach().reshape(-1, self.size) @ v)[:, None] * v).view(x.shape)
        change = self.weight - self.weight.detach()  # zero, with W's gradient
        y = functional.linear(x, self.weight.detach(), self.bias)
        return y + self.scale * functional.linear(x_hat, change)


def with_velora(model: nn.Module, section: dict[str, Any]) -> nn.Module:
    """The model with plain layers in the place of those that ``target_modules`` names, in place."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and any(t in name for t in section["target_modules"]):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, PlainVelora(module, section))
    return model


def projection(x: Tensor, v: Tensor) -> Tensor:
    """x̂ for sub-tokens of v's size."""
    return torch.outer(x.reshape(-1, v.numel()) @ v, v).view(x.shape)
