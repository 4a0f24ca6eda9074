"""Which parameter gets which settings."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from megalr.config.settings import GroupConfig, OptimizerConfig
from megalr.errors import UserError
from megalr.hosts import logical_shape
from megalr.layers import factor_names, matching, projected_layers
from megalr.rules.base import Rule

GroupName = Literal["factors", "projected", "matrices", "trunk", "embedding", "head", "norm"]
MATRIX_DIMENSIONS = (2, 3)  # a parameter of three is a stack


@dataclass(frozen=True, kw_only=True)
class Settings:
    """AdamW's settings of one group; a rule's matrices take the learning rate and the weight decay from them."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float


@dataclass(frozen=True)
class ParameterGroup:
    """Trainable parameters that share settings, by qualified name, in the model's order.

    Attributes:
        name, parameters, settings: as they say.
        rule: what updates them, as whole matrices; None for AdamW, element by element.
    """

    name: GroupName
    parameters: dict[str, nn.Parameter]
    settings: Settings
    rule: Rule | None = None


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[ParameterGroup]:
    """Sort a model's trainable parameters into groups; every parameter into exactly one, empty groups left out.

    - factors: what low-rank layers and their kin train, with the trunk's settings; the optimizer's rule updates them,
      if it has one. A group of their own, so that a reset of the factors covers whole flat buffers.
    - projected: R of projected layers, with the trunk's settings; a group of its own, since its moments follow bases.
    - matrices: the dense ones that the optimizer's rule updates, if it has one. A group of their own, so that no flat
      buffer holds anything else.
    - embedding: weights of ``nn.Embedding`` and of the output head.
    - head: the weight of the output head, where the rule has it or the embeddings, so that the two are told apart.
    - norm: everything with fewer than two dimensions, i.e. norms and biases; no weight decay unless asked for.
    - trunk: the rest.

    Raises:
        UserError: the rule would get nothing, or no head or embeddings where it is to have them, or a pattern of
            ``target_modules`` matches nothing.
    """
    factors = set(factor_names(model))
    projected = {id(layer.R) for layer in projected_layers(model).values()}
    embedding, head = _embedding_parameters(model), _head_parameter(model)
    members: dict[GroupName, dict[str, nn.Parameter]] = {
        "factors": {},
        "projected": {},
        "matrices": {},
        "trunk": {},
        "embedding": {},
        "head": {},
        "norm": {},
    }
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        group: GroupName = "trunk"
        if name in factors:
            group = "factors"
        elif id(parameter) in projected:
            group = "projected"
        elif id(parameter) == head:
            group = "head" if config.head or config.embeddings else "embedding"
        elif id(parameter) in embedding:
            group = "embedding"
        elif len(logical_shape(parameter)) < MATRIX_DIMENSIONS[0]:
            group = "norm"
        members[group][name] = parameter
    main = Settings(lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay)
    rest = main
    if config.rule is not None:
        chosen = _matrices(model, members["trunk"], config.target_modules, needed=not factors)
        chosen = {name for name in chosen if 0 not in logical_shape(members["trunk"][name])}  # nothing to update
        members["matrices"] = {n: p for n, p in members["trunk"].items() if n in chosen}
        members["trunk"] = {n: p for n, p in members["trunk"].items() if n not in chosen}
        rest = _override(main, config.adamw)
        _check_rank(config.rule, members["matrices"])
        vectors = [n for n, p in members["factors"].items() if len(logical_shape(p)) < MATRIX_DIMENSIONS[0]]
        if vectors and not config.rule.takes_vectors:
            raise UserError(
                f"{config.rule.name} updates matrices, and {vectors[0]} is a vector: write AdamW, or in a rule of your "
                "own that can update a matrix with one row `takes_vectors = True`"
            )
    settings: dict[GroupName, Settings] = {
        "factors": main,
        "projected": main,
        "matrices": main,
        "trunk": rest,
        "embedding": _override(main if config.embeddings else rest, config.embedding),
        "head": _override(main if config.head else rest, config.embedding),
        "norm": _override(replace(rest, weight_decay=0.0), config.norm),
    }
    trained = {id(p) for group in members.values() for p in group.values()}
    rules = _rules(config, head=head in trained, embeddings=not trained.isdisjoint(embedding))
    return [ParameterGroup(name, chosen, settings[name], rules.get(name)) for name, chosen in members.items() if chosen]


def _rules(config: OptimizerConfig, *, head: bool, embeddings: bool) -> dict[GroupName, Rule]:
    """The rule of each group that AdamW does not update; what the model trains of the two ends is said."""
    if config.rule is None:
        return {}
    for key, found in (("head", head), ("embeddings", embeddings)):
        if getattr(config, key) and not found:
            raise UserError(f'the model trains no {key}: remove "{key}" from optimizer.params')
    rules: dict[GroupName, Rule] = {"matrices": config.rule, "factors": config.rule}
    if config.head:
        rules["head"] = config.rule.for_head()
    if config.embeddings:
        rules["embedding"] = config.rule.for_embedding()
    return rules


def _matrices(
    model: nn.Module, trunk: dict[str, nn.Parameter], target_modules: tuple[str, ...] | str | None, *, needed: bool
) -> set[str]:
    """Names of the dense parameters that the rule gets; none is an error if any is needed."""
    where = "optimizer.params.target_modules"
    if target_modules is not None:
        candidates = [n for n, p in trunk.items() if len(logical_shape(p)) in MATRIX_DIMENSIONS]
        return matching(candidates, target_modules, where, "matrix")
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    chosen = {name for name, parameter in trunk.items() if id(parameter) in linear}
    if needed and not chosen:
        raise UserError(f'the model has no linear layer for the rule to train; name its matrices in "{where}"')
    return chosen


def _check_rank(rule: Rule, matrices: dict[str, nn.Parameter]) -> None:
    """A few matrices below the rank are projected to as much as they have; all of them below it is a mistake."""
    rank = getattr(rule, "rank", 0)
    largest = max((min(logical_shape(p)[-2:]) for p in matrices.values()), default=0)
    if rank > largest:
        raise UserError(
            f"optimizer.params.rank is {rank}, but no matrix that the rule gets has more than {largest} rows and "
            f"columns: write a rank of at most {largest}"
        )


def _embedding_parameters(model: nn.Module) -> set[int]:
    return {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}


def _head_parameter(model: nn.Module) -> int | None:
    # Hugging Face models name their head; elsewhere the customary name is the only sign.
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    if head is None:
        head = next((m for n, m in model.named_modules() if n.rpartition(".")[2] == "lm_head"), None)
    weight = getattr(head, "weight", None)
    return id(weight) if isinstance(weight, nn.Parameter) else None


def _override(settings: Settings, group: GroupConfig) -> Settings:
    given = {key: value for key, value in vars(group).items() if value is not None}
    return replace(settings, **given)
