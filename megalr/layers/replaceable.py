"""Which linear layers can be replaced: those that compute x Wᵀ + bias with a weight of their own, and no more.

A replacement takes over a layer's weight and bias. What else the user put on the layer would be lost without a word. A
model that reads the weight past the layer would miss what is learned beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from megalr.errors import UserError
from megalr.naming import submodule

OWN_WEIGHT = ("weight", "bias")
CALLED = ("__call__", "forward")


def check_replaceable(layers: Mapping[str, nn.Linear], where: str, *, keeps_weight: bool) -> None:
    """Raise a UserError for the first layer that has more than a replacement takes over.

    Args:
        layers: by qualified name.
        where: the key in the JSON that chose them, for the message.
        keeps_weight: the weight stays the parameter that gets the gradient, with its hooks.
    """
    for name, layer in layers.items():
        reason = _more_than_linear(layer) or ("" if keeps_weight else _hooked(layer.weight))
        if reason:
            raise UserError(f"{name} {reason}, which its replacement would drop: leave it out of {where}")


def check_parents(model: nn.Module, layers: Mapping[str, nn.Linear], where: str) -> None:
    """Raise a UserError for a layer whose parent is a module of torch that computes with the layer's weight itself."""
    for name in layers:
        parent = submodule(model, name.rpartition(".")[0])
        read = "always"
        if isinstance(parent, nn.TransformerEncoderLayer):
            read = "in eval() without gradients"
        elif not isinstance(parent, nn.MultiheadAttention):
            continue
        raise UserError(
            f"{name} cannot be replaced: {type(parent).__name__} reads its weight {read}, and would not compute with "
            f"what is learned: leave it out of {where}"
        )


def _more_than_linear(layer: nn.Linear) -> str:
    """What a linear layer has or does beside x Wᵀ + bias; empty if nothing."""
    kind = type(layer)
    computed = [name for name in OWN_WEIGHT if name not in layer._parameters]
    if computed:
        return f"has a {computed[0]} that is computed from others, as by weight_norm, spectral_norm or prune"
    if any(getattr(kind, name) is not getattr(nn.Linear, name) for name in CALLED):
        return f"is a {kind.__name__}, which computes something of its own in forward"
    if any(name in vars(layer) for name in CALLED):
        return "has a forward that was put on it alone"
    more = [name for name, _ in layer.named_parameters() if name not in OWN_WEIGHT]
    more += [name for name, _ in layer.named_buffers()] + [name for name, _ in layer.named_children()]
    if more:
        return f"has {more[0]} beside its weight and bias"
    # Every kind of hook that a module keeps; gradients', checkpoints' and those around forward.
    hooks = [name for name, kept in vars(layer).items() if name.endswith("_hooks") and kept]
    return f"has hooks ({hooks[0].strip('_')})" if hooks else ""


def _hooked(weight: Any) -> str:
    """Hooks on the gradient of a weight that no longer gets one."""
    return "has hooks on its weight" if weight._backward_hooks or weight._post_accumulate_grad_hooks else ""
