"""Exchange a model's linear layers, chosen by name, for another parametrization of their weights."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields

from torch import nn

from megalr.errors import UserError
from megalr.hosts import is_partitioned
from megalr.layers.base import (
    NAME,
    FactorizedLinear,
    FullConfig,
    KeepsWeight,
    Parametrization,
    ParametrizationConfig,
)
from megalr.layers.low_rank import LowRankLinear
from megalr.layers.projected import ProjectedLinear
from megalr.layers.replaceable import check_parents, check_replaceable
from megalr.naming import named_modules, named_parameters, submodule

MADE_BY = "megalr_parametrization"  # the attribute in which a replaced layer keeps the configuration that made it
SHOWN = 4  # settings in a message
TARGETS = "target_modules"


def parametrize(model: nn.Module, config: ParametrizationConfig, *, seed: int = 0) -> nn.Module:
    """Replace every ``nn.Linear`` that ``config.target_modules`` names, in place, and return the model.

    Works on real tensors and on the meta device (where nothing is initialized). What a layer does not need of its
    dense weight is freed at once, so that the peak is the dense model's size.

    Args:
        model: any module; its layers keep their qualified names.
        config: the "parametrization" section.
        seed: key of random starts.

    Raises:
        UserError: a pattern matches nothing, a rank exceeds a matrix, a weight is shared or frozen, a layer has more
            than a replacement takes over (:mod:`megalr.layers.replaceable`), the model was parametrized or partitioned
            by ``deepspeed.zero.Init`` before, or a user's parametrization makes layers that the optimizer cannot know.
    """
    if isinstance(config, FullConfig):
        return model
    _refuse_parametrized(model, config)
    targets = _targets(model, config)
    for name, layer in targets.items():
        _refuse_frozen(name, layer, config)
        config.check(name, layer)
    replaced: dict[str, nn.Module] = {}
    for name in list(targets):
        parent, _, child = name.rpartition(".")
        replaced[name] = config.replace(targets.pop(name), seed=seed, name=name)
        _check_layer(replaced[name], config)
        setattr(replaced[name], NAME, name)
        setattr(replaced[name], MADE_BY, config)
        setattr(submodule(model, parent), child, replaced[name])
    config.connect(replaced)
    return model


def check_whole(model: nn.Module) -> None:
    """Raise a UserError for a module that is a part of the one that was parametrized."""
    for name, layer in replaced_layers(model).items():
        given = getattr(layer, NAME, name)
        if given.endswith(f".{name}"):
            raise UserError(
                f"megalr.build_optimizer was given a part of the model that megalr.parametrize got: {name} is {given} "
                "there. Give both of them the model that the engine gets"
            )


def check_made_by(model: nn.Module, config: ParametrizationConfig) -> None:
    """Raise a UserError for a replaced layer that has another configuration than the one that is trained with.

    Checkpoints keep that one alone, and exports multiply by its scale. Layers that a program has put into the model
    itself have none, and are not looked at.

    Args:
        model: with replaced layers.
        config: the "parametrization" section that the optimizer is built with.
    """
    for name, layer in replaced_layers(model).items():
        made_by = getattr(layer, MADE_BY, None)
        if made_by is None:
            continue
        keys = ["type"] if made_by.type != config.type else [field.name for field in fields(made_by)]
        differing = [k for k in keys if k != TARGETS and getattr(made_by, k) != getattr(config, k, None)]
        if not differing and not _chooses(config, getattr(layer, NAME, name)):
            differing = [TARGETS]
        found = [f"{key} {_shown(made_by, key)} -> {_shown(config, key)}" for key in differing]
        if found:
            raise UserError(
                f"{name} was parametrized with another megalr.parametrization than megalr.build_optimizer is given "
                f"(then -> now): {', '.join(found[:SHOWN])}. Checkpoints and exports know one of a model: call "
                "megalr.parametrize once, and give both of them the same JSON"
            )


def factor_pairs(model: nn.Module) -> Iterator[tuple[str, str]]:
    """The qualified names of every low-rank pair of the model that is trained, both of it, as (B, A)."""
    for name, module in named_modules(model):
        if isinstance(module, LowRankLinear) and module.B.requires_grad and module.A.requires_grad:
            prefix = f"{name}." if name else ""
            yield f"{prefix}B", f"{prefix}A"


def half_frozen(layers: Mapping[str, nn.Module]) -> dict[str, tuple[str, str]]:
    """The layers with factors B and A of which one is trained and the other is frozen.

    Args:
        layers: the replaced ones by qualified name.

    Returns:
        By layer the last names of the frozen factor and of the trained one.
    """
    found: dict[str, tuple[str, str]] = {}
    for name, layer in layers.items():
        factors = {key: p for key, p in layer.named_parameters(recurse=False) if key in ("B", "A")}
        trained = [key for key, p in factors.items() if p.requires_grad]
        if len(factors) == 2 and len(trained) == 1:
            found[name] = ("A" if trained == ["B"] else "B", trained[0])
    return found


def factor_names(model: nn.Module) -> Iterator[str]:
    """The qualified names of what low-rank layers and their kin train in place of a dense weight."""
    for name, module in named_modules(model):
        if isinstance(module, FactorizedLinear):
            yield from (f"{name}.{factor}" if name else factor for factor in module.factors)


def replaced_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of the model that stand in the place of a linear one, by qualified name, in its order."""
    return {n: m for n, m in named_modules(model) if isinstance(m, FactorizedLinear | ProjectedLinear)}


def bypassed_layers(model: nn.Module) -> list[str]:
    """The names of the replaced layers whose W0 the model has read in training, and which it has never called."""
    return [name for name, module in named_modules(model) if isinstance(module, KeepsWeight) and module.is_bypassed]


def forget_reads(model: nn.Module) -> None:
    """Forget who has read W0 of replaced layers so far: it was not the model, which has computed nothing yet."""
    for module in model.modules():
        if isinstance(module, KeepsWeight):
            module.was_read = False


def projected_layers(model: nn.Module) -> dict[str, ProjectedLinear]:
    """The projected layers of the model by qualified name, in its order."""
    return {name: module for name, module in named_modules(model) if isinstance(module, ProjectedLinear)}


def matching(names: Iterable[str], patterns: tuple[str, ...] | str, where: str, what: str) -> set[str]:
    """The names that ``target_modules`` chooses, in the way of transformers.

    Args:
        names: qualified names.
        patterns: substrings, of which one has to occur; or one regular expression for the whole name.
        where: the key in the JSON, for messages.
        what: what the names are of, for messages.

    Raises:
        UserError: a pattern matches nothing, or is no regular expression.
    """
    names = list(names)
    if isinstance(patterns, str):
        try:
            expression = re.compile(patterns)
        except re.error as error:
            raise UserError(f"{where} is not a valid regular expression: {patterns!r} ({error})") from error
        chosen = {name for name in names if expression.fullmatch(name)}
        unmatched = [] if chosen else [patterns]
    else:
        chosen = {name for name in names if any(p in name for p in patterns)}
        unmatched = [p for p in patterns if not any(p in name for name in names)]
    if unmatched:
        some = ", ".join(names[:4]) or "none"
        hint = " (a single string is a regular expression for the whole name; use a list for substrings)"
        raise UserError(
            f"{where}: {unmatched[0]!r} matches no {what}{hint if isinstance(patterns, str) else ''}; "
            f"the model has: {some}{', ...' if len(names) > 4 else ''}"
        )
    return chosen


def _targets(model: nn.Module, config: Parametrization) -> dict[str, nn.Linear]:
    linear = {name: module for name, module in named_modules(model) if isinstance(module, nn.Linear)}
    where = "megalr.parametrization.target_modules"
    names = matching(linear, config.target_modules, where, "linear layer")
    chosen = {name: layer for name, layer in linear.items() if name in names}
    _refuse_partitioned(chosen)  # first: an engine puts hooks of its own on such a model
    check_replaceable(chosen, where, keeps_weight=False)
    check_parents(model, chosen, where)
    _refuse_shared(model, chosen)
    return chosen


def _refuse_parametrized(model: nn.Module, config: Parametrization) -> None:
    for name in replaced_layers(model):
        if _chooses(config, name):
            raise UserError(
                f"{name} has been parametrized before: megalr.parametrize or megalr.initialize takes a dense model, "
                "once. Build the model anew, and after megalr.parametrize call megalr.build_optimizer and "
                "deepspeed.initialize"
            )


def _chooses(config: ParametrizationConfig, name: str) -> bool:
    patterns = () if isinstance(config, FullConfig) else config.target_modules
    return bool(re.search(patterns, name)) if isinstance(patterns, str) else any(p in name for p in patterns)


def _shown(config: ParametrizationConfig, key: str) -> str:
    return json.dumps(getattr(config, key, None), default=str)


def _refuse_frozen(name: str, layer: nn.Linear, config: Parametrization) -> None:
    """What keeps W0 keeps what stands beside it frozen as well; new factors in its place would be trained, or noise."""
    if not layer.weight.requires_grad and "weight" not in config.parts:
        raise UserError(
            f'{name} is frozen (requires_grad is False), and "{config.type}" puts new factors in the place of its '
            "weight: leave it out of megalr.parametrization.target_modules, or call requires_grad_() on it"
        )


def _check_layer(layer: nn.Module, config: Parametrization) -> None:
    """Refuse a layer that a parametrization has made if the optimizer would not find what it trains."""
    if isinstance(layer, ProjectedLinear):
        return
    made = f"{type(config).__name__}.replace returns {type(layer).__name__}"
    if not isinstance(layer, FactorizedLinear):
        raise UserError(
            f"{made}, which has to derive from megalr.layers.base.FactorizedLinear and to name in `factors` what it "
            "trains in the weight's place"
        )
    trained = dict(layer.named_parameters())
    missing = [name for name in getattr(layer, "factors", ()) if name not in trained]
    if missing or not hasattr(layer, "factors"):
        what = f"names {missing[0]}" if missing else "is missing"
        raise UserError(
            f"{made}, of which `factors` {what}: write the names of the parameters that it trains in the weight's "
            f"place, of {', '.join(trained) or 'none that it has'}"
        )


def _refuse_partitioned(chosen: dict[str, nn.Linear]) -> None:
    if any(is_partitioned(layer.weight) for layer in chosen.values()):
        raise UserError(
            "the model was built under deepspeed.zero.Init, which has already cut its weights: build it without, "
            "call megalr.parametrize, then deepspeed.initialize, which shards what it made (with transformers' "
            "Trainer: before TrainingArguments are made)"
        )


def _refuse_shared(model: nn.Module, chosen: dict[str, nn.Linear]) -> None:
    names: dict[int, list[str]] = {}
    for name, parameter in named_parameters(model, remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for name, layer in chosen.items():
        if len(names[id(layer.weight)]) > 1:
            shared = " and ".join(names[id(layer.weight)])
            raise UserError(
                f"{shared} are one shared weight, which cannot be parametrized: leave {name} out of target_modules"
            )
