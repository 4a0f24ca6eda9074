"""Which parameter gets which settings."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from megalr.config import AdamWConfig, GroupConfig
from megalr.layers import factor_pairs

GroupName = Literal["factors", "trunk", "embedding", "norm"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """AdamW's settings of one group."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float


@dataclass(frozen=True)
class ParameterGroup:
    """Trainable parameters that share settings, by qualified name, in the model's order."""

    name: GroupName
    parameters: dict[str, nn.Parameter]
    settings: Settings


def parameter_groups(model: nn.Module, config: AdamWConfig) -> list[ParameterGroup]:
    """Sort a model's trainable parameters into groups; every parameter into exactly one, empty groups left out.

    - factors: the B and A of low-rank layers, with the trunk's settings. A group of their own, so that a reset of the
      factors covers whole flat buffers.
    - embedding: weights of ``nn.Embedding`` and of the output head.
    - norm: everything with fewer than two dimensions, i.e. norms and biases; no weight decay unless asked for.
    - trunk: the rest.
    """
    factors = {name for pair in factor_pairs(model) for name in pair}
    embedding = _embedding_parameters(model)
    members: dict[GroupName, dict[str, nn.Parameter]] = {"factors": {}, "trunk": {}, "embedding": {}, "norm": {}}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        group: GroupName = "trunk"
        if name in factors:
            group = "factors"
        elif id(parameter) in embedding:
            group = "embedding"
        elif len(getattr(parameter, "ds_shape", parameter.shape)) < 2:
            group = "norm"
        members[group][name] = parameter
    trunk = Settings(lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay)
    settings: dict[GroupName, Settings] = {
        "factors": trunk,
        "trunk": trunk,
        "embedding": _override(trunk, config.embedding),
        "norm": _override(replace(trunk, weight_decay=0.0), config.norm),
    }
    return [ParameterGroup(name, chosen, settings[name]) for name, chosen in members.items() if chosen]


def _embedding_parameters(model: nn.Module) -> set[int]:
    found = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    # Hugging Face models name their head; elsewhere the customary name is the only sign.
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    if head is None:
        head = next((m for n, m in model.named_modules() if n.rpartition(".")[2] == "lm_head"), None)
    weight = getattr(head, "weight", None)
    if isinstance(weight, nn.Parameter):
        found.add(id(weight))
    return found


def _override(settings: Settings, group: GroupConfig) -> Settings:
    given = {key: value for key, value in vars(group).items() if value is not None}
    return replace(settings, **given)
