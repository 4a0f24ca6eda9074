"""What a parameter is: the role that it plays in its model, whoever trains it and at which settings."""

from __future__ import annotations

from typing import Literal

from torch import nn

from megalr.hosts import logical_shape
from megalr.layers.base import FactorizedLinear
from megalr.layers.projected import ProjectedLinear
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


def possible_heads(model: nn.Module) -> dict[str, str]:
    """Layers that may be the output head of a model that does not tell, with the embedding that speaks for it.

    They are linear or stand in the place of a linear layer, have as many outputs as the embedding has rows, do not
    share its weight, and stand outside of any stack of layers, in whose names there are numbers.

    Returns:
        Qualified names, in the model's order; none if the head is known.
    """
    if _head_module(model) is not None:
        return {}
    embeddings = {name: module for name, module in named_modules(model) if isinstance(module, nn.Embedding)}
    shared = {id(module.weight) for module in embeddings.values()}
    get_input = getattr(unwrapped(model), "get_input_embeddings", None)
    of_tokens = get_input() if callable(get_input) else None
    if isinstance(of_tokens, nn.Embedding):  # else positions and types count as well
        embeddings = {name: module for name, module in embeddings.items() if module is of_tokens}
    rows = {module.num_embeddings: name for name, module in reversed(embeddings.items())}
    found = {}
    for name, module in named_modules(model):
        is_linear = isinstance(module, nn.Linear) and id(module.weight) not in shared
        if not (is_linear or isinstance(module, FactorizedLinear | ProjectedLinear)):
            continue
        outputs = getattr(module, "out_features", None)  # a user's own layer may have none
        if outputs in rows and not any(part.isdigit() for part in name.split(".")):
            found[name] = rows[outputs]
    return found


def _by_dimensions(dimensions: int) -> Role:
    if dimensions < 2:
        return "vector"
    return "matrix" if dimensions == 2 else "stack" if dimensions == 3 else "other"


def _head(model: nn.Module) -> nn.Parameter | None:
    """The weight of the output head, if the model has one that can be told."""
    weight = getattr(_head_module(model), "weight", None)
    return weight if isinstance(weight, nn.Parameter) else None


def _head_module(model: nn.Module) -> nn.Module | None:
    # Hugging Face models name their head; elsewhere the customary name is the only sign.
    get_head = getattr(unwrapped(model), "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    if head is None:
        head = next((m for n, m in named_modules(model) if n.rpartition(".")[2] == "lm_head"), None)
    return head
