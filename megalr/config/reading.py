"""From the DeepSpeed JSON to typed sections: which keys there are, what "auto" stands for, what an error says."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megalr.config import text
from megalr.config.guards import GuardsConfig
from megalr.config.sections import (
    GeneralConfig,
    GroupConfig,
    MomentumResetConfig,
    OptimizerConfig,
    RefactorizationConfig,
)
from megalr.errors import UserError
from megalr.hosts.features import refuse_unknown
from megalr.layers.base import ParametrizationConfig
from megalr.layers.registry import PARAMETRIZATIONS
from megalr.layers.velora import VeloraConfig
from megalr.plugins import load_plugins
from megalr.resources import folder
from megalr.rules.base import Rule
from megalr.rules.registry import RULES, canonical, hyperparameters
from megalr.schema import Json, build, check_keys, check_types, nearest

# What "auto" stands for in the optimizer's "params" when transformers' TrainingArguments are at hand.
AUTO: dict[str, Callable[[Any], Any]] = {
    "lr": lambda arguments: arguments.learning_rate,
    "betas": lambda arguments: [arguments.adam_beta1, arguments.adam_beta2],
    "eps": lambda arguments: arguments.adam_epsilon,
    "weight_decay": lambda arguments: arguments.weight_decay,
}

# Keys of the optimizer's "params" that mean nothing where AdamW trains everything.
ONLY_WITH_A_RULE = ("adamw", "target_modules", "head", "embeddings")
GROUPS = ("adamw", "embedding", "norm")  # keys of "params" that are sections themselves

# Sections of "megalr" that have one type; "parametrization" and "optimizer" name theirs.
SECTIONS: dict[str, type] = {
    "refactorization": RefactorizationConfig,
    "momentum_reset": MomentumResetConfig,
    "activations": VeloraConfig,
    "guards": GuardsConfig,
}
VALUES = tuple(field.name for field in dataclasses.fields(GeneralConfig))


def read_json(config: Json | str | Path) -> dict[str, Any]:
    """The DeepSpeed configuration as a dictionary, from a path or as it is; a UserError when it cannot be read."""
    if isinstance(config, Mapping):
        content = dict(config)
    elif not isinstance(config, str | Path):
        raise UserError(
            "expected the DeepSpeed configuration as a dictionary or the path of its JSON, found a "
            f"{type(config).__name__}"
        )
    else:
        path = Path(config)
        if not os.path.isfile(path):  # Path.is_file raises for names that are too long
            raise UserError(f"no DeepSpeed configuration at {path}; ready ones are in {folder('ds_configs')}")
        content = text.read(path)
    text.check_values(content)
    refuse_unknown(content)
    return content


def fill_auto(content: Json, training_args: Any | None) -> dict[str, Any]:
    """Replace each "auto" in the optimizer's "params"; what changes is copied.

    Args:
        content: the DeepSpeed configuration.
        training_args: an object with the attributes of ``transformers.TrainingArguments``. None drops every "auto"
            instead, for callers that do not need the values.
    """
    filled = dict(content)
    section = content.get("megalr")
    if isinstance(section, Mapping) and "optimizer" in section:
        filled["megalr"] = fill_auto(section, training_args)
    optimizer = content.get("optimizer")
    if isinstance(optimizer, Mapping) and isinstance(optimizer.get("params"), Mapping):
        params = dict(optimizer["params"])
        for key in [key for key in AUTO if params.get(key) == "auto"]:
            del params[key]
            if training_args is not None:
                params[key] = AUTO[key](training_args)
        filled["optimizer"] = {**optimizer, "params": params}
    return filled


def read_sections(content: Json) -> dict[str, Any]:
    """The fields of :class:`~megalr.config.settings.MegalrConfig` that a DeepSpeed configuration sets.

    The plugins that it names are loaded first, since they may bring the methods that it asks for.

    Raises:
        UserError: a section has an unknown key, a value of another type, or one out of range.
    """
    section = content.get("megalr", {})
    if not isinstance(section, Mapping):
        raise UserError(f'"megalr" must be an object like {{"parametrization": {{...}}}}, not {section!r}')
    check_keys(section, dict.fromkeys(("optimizer", "parametrization", *SECTIONS, *VALUES)), "megalr")
    values = check_types(GeneralConfig, {key: section[key] for key in VALUES if key in section}, "megalr")
    load_plugins(values.get("plugins", ()))
    if "parametrization" in section:
        values["parametrization"] = _parametrization(section["parametrization"])
    for name, cls in SECTIONS.items():
        if section.get(name) is not None:
            values[name] = build(cls, section[name], f"megalr.{name}")
    if "optimizer" in section and "optimizer" in content:
        raise UserError('"optimizer" and "megalr.optimizer" are both given: remove one')
    values["optimizer"] = _optimizer(section.get("optimizer", content.get("optimizer", {"type": "AdamW"})))
    return values


def _parametrization(section: Any) -> ParametrizationConfig:
    where = "megalr.parametrization"
    if not isinstance(section, Mapping) or "type" not in section:
        raise UserError(f'{where} must be an object with a "type", one of: {", ".join(PARAMETRIZATIONS)}')
    kind = section["type"]
    if not isinstance(kind, str) or kind not in PARAMETRIZATIONS:
        raise UserError(f"{where}.type is {kind!r}{nearest(str(kind), PARAMETRIZATIONS)}")
    chosen = PARAMETRIZATIONS[kind]
    for key, instead in getattr(chosen, "instead", {}).items():
        if key in section:
            raise UserError(f'{where} has no key "{key}" with "type": "{kind}": {instead}')
    return build(chosen, section, where)


def _optimizer(section: Any) -> OptimizerConfig:
    rule, params = _rule_and_params(section)
    where = "optimizer.params"
    of_rule = hyperparameters(rule) if rule else []
    own_keys = [f.name for f in dataclasses.fields(OptimizerConfig) if f.name != "rule"]
    if rule is None:
        own_keys = [key for key in own_keys if key not in ONLY_WITH_A_RULE]
    check_keys(params, dict.fromkeys(own_keys + of_rule), where)
    unresolved = next((key for key in AUTO if params.get(key) == "auto"), None)
    if unresolved is not None:
        raise UserError(
            f'{where}.{unresolved} is "auto"; write a number, or with transformers\' Trainer pass '
            "training_args= to megalr.build_optimizer"
        )
    given = {key: value for key, value in params.items() if key in own_keys}
    groups = {key: build(GroupConfig, given.pop(key), f"{where}.{key}") for key in GROUPS if key in given}
    own = check_types(OptimizerConfig, given, where) | groups
    if rule is None:
        return OptimizerConfig(**own)
    defaults = {"lr": rule.default_lr, "eps": rule.default_eps, "betas": getattr(rule, "betas", (0.9, 0.999))}
    built = build(rule, {key: value for key, value in params.items() if key in of_rule}, where)
    return OptimizerConfig(**{**defaults, **own}, rule=built)


def _rule_and_params(section: Any) -> tuple[type[Rule] | None, Json]:
    """What the "optimizer" section names, None for AdamW, and its "params"."""
    if not isinstance(section, Mapping) or "type" not in section:
        raise UserError(f'"optimizer" must be an object with a "type", one of: {", ".join(RULES)}')
    check_keys(section, {"type": None, "params": None}, "optimizer")
    kind, params = section["type"], section.get("params", {})
    rules = {canonical(name): rule for name, rule in RULES.items()}
    if not isinstance(kind, str):
        raise UserError(f"optimizer.type is {json.dumps(kind)}; write one of: {', '.join(RULES)}")
    if canonical(kind) not in rules:
        raise UserError(f"optimizer.type is {kind!r}{nearest(kind, RULES)}")
    if not isinstance(params, Mapping):
        raise UserError(f'optimizer.params must be an object like {{"lr": 1e-3}}, not {json.dumps(params)}')
    return rules[canonical(kind)], params
