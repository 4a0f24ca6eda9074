"""What decides what an optimizer's state looks like, beside the shapes of the parameters."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from megalr.config.settings import MegalrConfig
from megalr.rules.registry import hyperparameters


def rule_form(config: MegalrConfig) -> dict[str, Any]:
    """The rule, and those of its settings that its state depends on."""
    rule = config.optimizer.rule
    return _with_extents(config, {"rule": "adamw"} if rule is None else rule.form())


def logical_form(config: MegalrConfig) -> dict[str, Any]:
    """The same but for how numbers are stored: states of equal forms can be converted into each other."""
    rule = config.optimizer.rule
    return _with_extents(config, {"rule": "adamw"} if rule is None else rule.logical_form())


def layer_form(config: MegalrConfig) -> dict[str, Any]:
    """The parametrization, and those of its settings that what its layers keep depends on."""
    form: dict[str, Any] = dict(config.parametrization.form())
    return form if config.activations is None else form | config.activations.form()


def rule_settings(config: MegalrConfig) -> dict[str, Any]:
    """The rule's name and all of its settings, as JSON has them; those that the JSON left out are defaults."""
    rule = config.optimizer.rule
    if rule is None:
        return {}
    given = {key: getattr(rule, key) for key in hyperparameters(type(rule))}
    settings: dict[str, Any] = json.loads(json.dumps({"rule": rule.name, **given}, default=repr))
    return settings


def changed_settings(before: Mapping[str, Any] | None, config: MegalrConfig) -> list[str]:
    """Sentences on settings with which the rule goes on in another way than it did.

    Args:
        before: the :func:`rule_settings` that a checkpoint has; None where it is of a time when it had none.
        config: that goes on.
    """
    now, rule = rule_settings(config), config.optimizer.rule
    if before is None and rule is not None:
        return [
            f"the checkpoint does not say what optimizer.params.{key} was, and the default has changed since: the run "
            f'goes on with {json.dumps(now[key])}; write "{key}": {json.dumps(value)} for the former default'
            for key, value in rule.former_defaults.items()
            if now[key] != value
        ]
    if before is None or before.get("rule") != now.get("rule"):
        return []
    return [
        f"optimizer.params.{key} was {json.dumps(before[key])} and is {json.dumps(value)} now"
        for key, value in now.items()
        if key in before and before[key] != value
    ]


def in_words(form: Mapping[str, Any]) -> str:
    """A form for the reader."""
    return ", ".join(f"{key} {value}" for key, value in form.items()) or "no rule"


def _with_extents(config: MegalrConfig, form: Mapping[str, Any]) -> dict[str, Any]:
    return {**form, **{key: True for key in ("head", "embeddings") if getattr(config.optimizer, key)}}
