"""From a JSON object to a frozen dataclass: known keys, declared types, and messages that say what to write."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar

from megalr.errors import UserError

T = TypeVar("T")
Json = Mapping[str, Any]


def build(cls: type[T], section: Any, where: str) -> T:
    """An instance of a section's dataclass from the JSON object at ``where``."""
    if not isinstance(section, Mapping):
        raise UserError(f"{where} must be an object, not {section!r}")
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    check_keys(section, fields, where)
    missing = [
        name
        for name, f in fields.items()
        if name not in section and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise UserError(f'{where} needs "{missing[0]}"')
    values = check_types(cls, section, where)
    return cls(**values)


def check_keys(section: Json, known: Mapping[str, Any], where: str) -> None:
    """Refuse a key that is not known, and name the one that may have been meant."""
    for key in section:
        if key not in known:
            raise UserError(f'{where} has no key "{key}"{nearest(str(key), known)}')


def nearest(word: str, known: Mapping[str, Any]) -> str:
    """The end of a message about an unknown word: the closest known one, and all of them."""
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    # Of two words that are equally close, the one that begins alike: AdamW for AdamX, not BAdam.
    close.sort(key=lambda name: (-difflib.SequenceMatcher(None, name, word).ratio(), -_alike(name, word)))
    close = close or [name for name in known if word and name.lower().startswith(word.lower())]
    hint = f'; did you mean "{close[0]}"?' if close else ";"
    return f"{hint} valid: {', '.join(known)}"


def slip(word: str, known: Iterable[str]) -> str | None:
    """The known word that a word is but for a letter missing, added or exchanged, two swapped, or capitals."""
    return next((each for each in known if each != word and _one_slip(word.lower(), each.lower())), None)


def resembles(word: str, known: Iterable[str], similarity: float) -> bool:
    """Whether a word is at least so similar to a known one, from 0 to 1 as difflib measures it."""
    return bool(difflib.get_close_matches(word.lower(), list(known), cutoff=similarity))


def _one_slip(first: str, second: str) -> bool:
    at = _alike(first, second)
    one, other = first[at:], second[at:]
    swapped = one[:2] == other[:2][::-1] and one[2:] == other[2:]
    return swapped or one[1:] == other[1:] or one[1:] == other or one == other[1:]


def _alike(first: str, second: str) -> int:
    """How many letters two words have in common from the start."""
    return len(os.path.commonprefix([first, second]))


def check_types(cls: type, section: Json, where: str) -> dict[str, Any]:
    """The section's values, lists made tuples and whole numbers made floats where a float is declared."""
    hints = typing.get_type_hints(cls)
    return {key: _convert(value, hints[key], f"{where}.{key}") for key, value in section.items()}


def _convert(value: Any, hint: Any, where: str) -> Any:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        options = typing.get_args(hint)
        for option in options:
            try:
                return _convert(value, option, where)
            except UserError:
                continue
        raise UserError(f"{where} is {json.dumps(value)}; expected {' or '.join(map(_describe, options))}")
    if typing.get_origin(hint) is Literal:
        if not any(value == option and type(value) is type(option) for option in typing.get_args(hint)):
            raise UserError(f"{where} is {json.dumps(value, default=str)}; expected {_describe(hint)}")
        return value
    if typing.get_origin(hint) is tuple:
        items = typing.get_args(hint)
        if isinstance(value, list | tuple) and (items[-1] is Ellipsis or len(items) == len(value)):
            return tuple(_convert(item, items[0], where) for item in value)
    elif hint is float:
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    elif isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    # Numbers like 1e-3 are strings in some YAML-to-JSON tools; "auto" is resolved by the launcher before this.
    raise UserError(f"{where} is {json.dumps(value, default=str)}; expected {_describe(hint)}")


def _describe(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "a string", bool: "true or false", type(None): "null"}
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(json.dumps(option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        items = typing.get_args(hint)
        count = "" if items[-1] is Ellipsis else f"{len(items)} "
        return f"a list of {count}" + _describe(items[0]).removeprefix("a ") + "s"
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def check_targets(patterns: tuple[str, ...] | str, where: str) -> None:
    """Refuse ``target_modules`` that name nothing."""
    named = bool(patterns) and "" not in tuple(patterns)
    require(named, f'{where} is empty or names ""; write e.g. ["attn", "mlp"]')


def check_ramp(section: object, steps: str, interval: str, where: str) -> None:
    """Refuse a ramp of the learning rate that its next start cuts off, so that the rate never is the schedule's again.

    Args:
        section: has both as attributes.
        steps: name of the ramp's length in updates; update number ``steps`` + 1 after its start has the whole rate.
        interval: name of the updates from one start to the next.
        where: the section in the JSON.
    """
    length, gap = getattr(section, steps), getattr(section, interval)
    require(length >= 0, f"{where}.{steps} is {length}; write at least 0")
    require(
        length < max(gap, 1),
        f"{where}.{steps} is {length} and {interval} {gap}, so the learning rate starts to rise again before it is "
        f'the schedule\'s: write "{steps}": {gap - 1} or less, or a larger "{interval}"',
    )


def require(condition: bool, message: str) -> None:
    """Raise a UserError unless the condition holds."""
    if not condition:
        raise UserError(message)
