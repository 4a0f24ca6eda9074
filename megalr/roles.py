"""What a parameter is: the role that it plays in its model, whoever trains it and at which settings."""

from __future__ import annotations

from typing import Literal

from torch import nn

from megalr.hosts import logical_shape
from megalr.layers.replacement import factor_names, projected_layers
from megalr.naming import named_modules, named_parameters, unwrapped

Role = Literal["factor", "projected", "head", "tied", "embedding", "linear", "matrix", "stack", "vector", "other"]

MATRICES: frozenset[Role] = frozenset({"linear", "matrix", "stack"})  # what a rule could update by itself


def roles(model: nn.Module) -> dict[str, Role]:
    """The role of each trainable parameter, by qualified name in the model's order.

    - factor: what low-rank layers and their kin train in place of a weight, of any shape.
    - projected: R of a projected layer.
    - head: the weight of the output head; tied: one that is an embedding, too.
    - embedding: a weight of ``nn.Embedding``.
    - linear: a weight of ``nn.Linear``; matrix: anything else of two dimensions.
    - stack: a stack of matrices, such as batched experts: three dimensions.
    - vector: fewer than two dimensions, that is norms, biases and scalars.
    - other: more than three dimensions.
    """
    factors = set(factor_names(model))
    projected = {id(layer.R) for layer in projected_layers(model).values()}
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    linear = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    head = _head(model)

    def role(name: str, parameter: nn.Parameter) -> Role:
        if name in factors:
            return "factor"
        if id(parameter) in projected:
            return "projected"
        if parameter is head:
            return "tied" if id(parameter) in embeddings else "head"
        if id(parameter) in embeddings:
            return "embedding"
        if id(parameter) in linear:
            return "linear"
        return _by_dimensions(len(logical_shape(parameter)))

    return {name: role(name, parameter) for name, parameter in named_parameters(model) if parameter.requires_grad}


def _by_dimensions(dimensions: int) -> Role:
    if dimensions < 2:
        return "vector"
    return "matrix" if dimensions == 2 else "stack" if dimensions == 3 else "other"


def _head(model: nn.Module) -> nn.Parameter | None:
    """The weight of the output head, if the model has one that can be told."""
    # Hugging Face models name their head; elsewhere the customary name is the only sign.
    get_head = getattr(unwrapped(model), "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    if head is None:
        head = next((m for n, m in named_modules(model) if n.rpartition(".")[2] == "lm_head"), None)
    weight = getattr(head, "weight", None)
    return weight if isinstance(weight, nn.Parameter) else None
