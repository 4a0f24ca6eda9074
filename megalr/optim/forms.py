"""What decides what an optimizer's state looks like, beside the shapes of the parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megalr.config.settings import MegalrConfig


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


def in_words(form: Mapping[str, Any]) -> str:
    """A form for the reader."""
    return ", ".join(f"{key} {value}" for key, value in form.items()) or "no rule"


def _with_extents(config: MegalrConfig, form: Mapping[str, Any]) -> dict[str, Any]:
    return {**form, **{key: True for key in ("head", "embeddings") if getattr(config.optimizer, key)}}
