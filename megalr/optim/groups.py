"""Which parameter gets which settings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from torch import nn

from megalr.config.sections import GroupConfig, OptimizerConfig
from megalr.errors import UserError
from megalr.hosts import logical_shape
from megalr.layers.replacement import factor_names, matching
from megalr.naming import named_parameters
from megalr.roles import MATRICES, Role, roles
from megalr.rules.base import Rule

GroupName = Literal["factors", "projected", "matrices", "trunk", "embedding", "head", "norm"]
GROUPS: tuple[GroupName, ...] = get_args(GroupName)  # in the order in which the optimizer has them


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
    """Sort a model's trainable parameters into groups; every parameter into exactly one.

    Groups without elements are left out, with the parameters of shapes such as (0, 8) in them: an engine makes no
    buffer of them. Other groups keep theirs.

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
        UserError: there are no such parameters, or one is complex, the rule would get nothing, or no head or embeddings
            where it is to have them, or a pattern of ``target_modules`` matches nothing.
    """
    found, parameters = roles(model), dict(named_parameters(model))
    refuse_complex(parameters)
    if all(_is_empty(parameters[name]) for name in found):
        raise UserError(
            "the model trains nothing: requires_grad is False for all of its parameters, or it has none. Call "
            "requires_grad_() on what is to be trained"
        )
    members: dict[GroupName, dict[str, nn.Parameter]] = {name: {} for name in GROUPS}
    for name, role in found.items():
        members[_group_of(role, config)][name] = parameters[name]
    main = Settings(lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay)
    rest = main
    if config.rule is not None:
        chosen = _matrices(found, config.target_modules, needed=next(factor_names(model), None) is None)
        chosen = {name for name in chosen if not _is_empty(parameters[name])}  # nothing to update
        members["matrices"] = {n: p for n, p in members["trunk"].items() if n in chosen}
        members["trunk"] = {n: p for n, p in members["trunk"].items() if n not in chosen}
        rest = _override(main, config.adamw)
        _check_rank(config.rule, members["matrices"])
        _check_vectors(config.rule, members["factors"])
    settings: dict[GroupName, Settings] = {
        "factors": main,
        "projected": main,
        "matrices": main,
        "trunk": rest,
        "embedding": _override(main if config.embeddings else rest, config.embedding),
        "head": _override(main if config.head else rest, config.embedding),
        "norm": _override(replace(rest, weight_decay=0.0), config.norm),
    }
    rules = _rules(config, set(found.values()))
    filled = {name: chosen for name, chosen in members.items() if not all(map(_is_empty, chosen.values()))}
    return [ParameterGroup(name, chosen, settings[name], rules.get(name)) for name, chosen in filled.items()]


def refuse_complex(parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise a UserError for a trained parameter with complex elements, of which neither AdamW nor rules know."""
    name = next((name for name, p in parameters.items() if p.requires_grad and p.is_complex()), None)
    if name is not None:
        raise UserError(
            f"{name} is complex, and the optimizer updates real numbers: make it a real parameter with a last "
            "dimension of 2, of which the model takes torch.view_as_complex, or freeze it"
        )


def check_names(groups: Iterable[ParameterGroup], module: nn.Module) -> None:
    """Make sure that an optimizer's names are those of the module that the engine has.

    Raises:
        UserError: the optimizer was built for a part of that module, or for another one.
    """
    names = {id(parameter): name for name, parameter in named_parameters(module)}
    for group in groups:
        for name, parameter in group.parameters.items():
            found = names.get(id(parameter))
            if found != name:
                theirs = f"{found} in the engine's model" if found else "no parameter of the engine's model"
                raise UserError(
                    f"megalr's optimizer was built for another module than the engine's: {name} is {theirs}. Give "
                    "megalr.build_optimizer the model that the engine gets, as it is then"
                )


def check_settings(groups: Iterable[ParameterGroup], param_groups: Iterable[Mapping[str, Any]]) -> None:
    """Make sure that what a rule has of its own is not changed where the rule does not read it.

    Raises:
        UserError: betas or eps of a rule's group are no longer those of the configuration.
    """
    for group, now in zip(groups, param_groups, strict=True):
        if group.rule is None:
            continue
        for key in ("betas", "eps"):
            given, found = getattr(group.settings, key), now[key]
            if found != given and not (key == "betas" and tuple(found) == tuple(given)):
                raise UserError(
                    f'param_groups has {key} {found} for the group "{group.name}", and the rule that updates it, '
                    f"{group.rule.name}, goes on with {given}: leave {key} of this group as it was, or write another "
                    f'"{key}" in optimizer.params and build the optimizer again'
                )


def _is_empty(parameter: nn.Parameter) -> bool:
    """Whether a parameter has no elements, so that there is nothing to train."""
    return 0 in logical_shape(parameter)


def _group_of(role: Role, config: OptimizerConfig) -> GroupName:
    """The group of a parameter, as long as no rule has taken it out of the trunk."""
    match role:
        case "factor":
            return "factors"
        case "head" | "tied":
            return "head" if config.head or config.embeddings else "embedding"
        case "projected" | "embedding":
            return role
        case "vector":
            return "norm"
        case _:
            return "trunk"


def _rules(config: OptimizerConfig, trained: set[Role]) -> dict[GroupName, Rule]:
    """The rule of each group that AdamW does not update; refuse a head or embeddings that the model does not train."""
    if config.rule is None:
        return {}
    for key, found in (("head", {"head", "tied"}), ("embeddings", {"embedding", "tied"})):
        if getattr(config, key) and trained.isdisjoint(found):
            known = " that get_output_embeddings() or the name lm_head tells" if key == "head" else ""
            raise UserError(f'the model trains no {key}{known}: remove "{key}" from optimizer.params')
    rules: dict[GroupName, Rule] = {"matrices": config.rule, "factors": config.rule}
    if config.head:
        rules["head"] = config.rule.for_head()
    if config.embeddings:
        rules["embedding"] = config.rule.for_embedding()
    return rules


def _matrices(found: dict[str, Role], target_modules: tuple[str, ...] | str | None, *, needed: bool) -> set[str]:
    """Names of the dense parameters that the rule gets; none is an error if any is needed."""
    where = "optimizer.params.target_modules"
    if target_modules is not None:
        return matching([name for name, role in found.items() if role in MATRICES], target_modules, where, "matrix")
    chosen = {name for name, role in found.items() if role == "linear"}
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


def _check_vectors(rule: Rule, factors: dict[str, nn.Parameter]) -> None:
    """Refuse a vector among the factors that a rule for matrices is to train."""
    vector = next((name for name, p in factors.items() if len(logical_shape(p)) < 2), None)
    if vector is not None and not rule.takes_vectors:
        raise UserError(
            f"{rule.name} updates matrices, and {vector} is a vector: write AdamW, or in a rule of your own that can "
            "update a matrix with one row `takes_vectors = True`"
        )


def _override(settings: Settings, group: GroupConfig) -> Settings:
    given = {key: value for key, value in vars(group).items() if value is not None}
    return replace(settings, **given)
