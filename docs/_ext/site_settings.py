"""Tables of JSON keys: type, range, default and meaning, read from the dataclasses and tried on the real reader.

A range is found by trying: :func:`bounds` gives values to ``MegalrConfig.from_json`` and notes which are refused.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

from megalr.config.reading import SECTIONS
from megalr.config.sections import GeneralConfig, GroupConfig, OptimizerConfig
from megalr.config.settings import MegalrConfig
from megalr.errors import UserError
from megalr.formatting import markdown_table
from megalr.layers.registry import PARAMETRIZATIONS
from megalr.methods import meanings, plain
from megalr.rules.registry import RULES, hyperparameters

COLUMNS = ("key", "type and range", "default", "meaning")
SHARED_COLUMNS = ("key", "type and range", "default (others)", "meaning (types that have the key)")
STEP = 1e-9  # a bound is open where the bound is refused and a value this far inside is accepted
NEED_FACTORS = ("refactorization", "momentum_reset")  # sections that need low-rank layers, and an interval
FAR = 1e7  # nothing has a bound out here that a reader has to know
NAMES = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "`null`"}
Accepts = Callable[[Any], bool]


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a dataclass stands in the JSON.

    Attributes:
        cls: the dataclass whose fields are the keys.
        path: the keys that lead to it.
        base: the smallest JSON in which it is valid.
        keys: the keys to show, in order.
    """

    cls: type
    path: tuple[str, ...]
    base: Mapping[str, Any]
    keys: Sequence[str]

    def with_value(self, key: str, value: Any) -> dict[str, Any]:
        """The base with one key set."""
        content = json.loads(json.dumps(self.base))
        section = content
        for step in self.path:
            section = section.setdefault(step, {})
        section[key] = value
        return content

    def accepts(self, key: str) -> Accepts:
        """A function that says whether the reader takes a value of a key."""

        def accepted(value: Any) -> bool:
            try:
                MegalrConfig.from_json(self.with_value(key, value))
            except UserError:
                return False
            return True

        return accepted

    def present(self) -> dict[str, Any]:
        """The values of the number fields of the base, against which a bound may be relative."""
        section: Any = self.base
        for step in self.path:
            section = section.get(step, {})
        fields = {field.name: section.get(field.name, field.default) for field in dataclasses.fields(self.cls)}
        return {name: value for name, value in fields.items() if type(value) in (int, float)}


def table(place: Place) -> str:
    """The Markdown table of a section's keys.

    Raises:
        ValueError: a key has no meaning under "Attributes:" in the docstring of its class.
    """
    rows = [[f"`{key}`", kind, default, meaning] for key, kind, default, meaning in _rows(place)]
    return markdown_table(COLUMNS, rows, numbers=False)


def shared_table(places: Mapping[str, Place]) -> str:
    """One table of the keys of several sections, in which those that say the same share a line.

    Args:
        places: sections by the "type" that chooses them.
    """
    found: dict[tuple[str, str, str], dict[str, str]] = {}
    for name, place in places.items():
        for key, kind, default, meaning in _rows(place):
            found.setdefault((key, kind, meaning), {})[name] = default
    rows = []
    for (key, kind, meaning), defaults in sorted(found.items(), key=lambda line: (-len(line[1]), line[0])):
        usual = Counter(defaults.values()).most_common(1)[0][0]
        others = [f"`{name}`: {default}" for name, default in defaults.items() if default != usual]
        whose = "all types" if len(defaults) == len(places) else ", ".join(f"`{name}`" for name in defaults)
        rows.append([f"`{key}`", kind, "; ".join([usual, *others]), f"{meaning} ({whose})"])
    return markdown_table(SHARED_COLUMNS, rows, numbers=False)


def _rows(place: Place) -> Iterator[tuple[str, str, str, str]]:
    """Key, type and range, default and meaning of each key."""
    fields = {field.name: field for field in dataclasses.fields(place.cls)}
    hints, said = typing.get_type_hints(place.cls), meanings(place.cls)
    for key in place.keys:
        if key not in said:
            raise ValueError(f'{place.cls.__name__} does not say under "Attributes:" what its key "{key}" means')
        kind = f"{describe(hints[key])}{_range(place, key, hints[key])}".replace("|", "\\|")
        text = plain(said[key])
        yield (
            key,
            kind,
            default_of(fields[key]),
            text[0].upper() + text[1:] if text[:2].isascii() and text[1] != "," else text,
        )


def describe(hint: Any) -> str:
    """A type as a reader of JSON knows it."""
    origin, items = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(describe, items)))
    if origin is Literal:
        return ", ".join(f"`{json.dumps(option)}`" for option in items)
    if origin is tuple:
        return f"list of {'' if items[-1] is Ellipsis else f'{len(items)} '}{describe(items[0])}s"
    if hint is GroupConfig:
        return f"object with {', '.join(f'`{field.name}`' for field in dataclasses.fields(GroupConfig))}"
    return NAMES.get(hint, getattr(hint, "__name__", str(hint)))


def default_of(field: dataclasses.Field[Any]) -> str:
    """A default as JSON has it."""
    if field.default_factory is not dataclasses.MISSING:
        return "`{}`"
    return "required" if field.default is dataclasses.MISSING else f"`{as_json(field.default)}`"


def as_json(value: Any) -> str:
    """A value as JSON, with floats in the short form: 1e-8."""
    if isinstance(value, float):
        return f"{value:g}".replace("e-0", "e-")
    if isinstance(value, tuple):
        return f"[{', '.join(map(as_json, value))}]"
    return json.dumps(value)


def _range(place: Place, key: str, hint: Any) -> str:
    """The range of a number, or of each number of a list; empty where everything is accepted."""
    accepts = place.accepts(key)
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    for option in options:
        if option in (int, float):
            return _in_words(bounds(accepts, whole=option is int), place, key)
        if typing.get_origin(option) is tuple and typing.get_args(option)[0] is float:
            rest = [0.5] * (len(typing.get_args(option)) - 1)
            found = bounds(lambda value, a=accepts, r=rest: a([value, *r]), whole=False)  # type: ignore[misc]
            return _in_words(found, place, key)
    return ""


@dataclasses.dataclass(frozen=True)
class Bound:
    """One end of a range; None for the value where there is none."""

    value: float | None
    closed: bool = True


def bounds(accepts: Accepts, *, whole: bool) -> tuple[Bound, Bound]:
    """The ends of the interval of numbers that are accepted, found by trying.

    Raises:
        ValueError: none of the usual values is accepted, so there is nowhere to start from.
    """
    usual = [1, 2, 10, 100, 1000, 0] if whole else [0.5, 0.01, 1.0, 2.0, 100.0, 0.0]
    start = next((value for value in usual if accepts(value)), None)
    if start is None:
        raise ValueError(f"none of {usual} is accepted")
    return _end(accepts, start, -FAR, whole), _end(accepts, start, FAR, whole)


def _end(accepts: Accepts, inside: float, outside: float, whole: bool) -> Bound:
    if accepts(int(outside) if whole else outside):
        return Bound(None)
    for _ in range(80):
        middle = (inside + outside) / 2
        if whole:
            middle = int(middle)
        if middle in (inside, outside):
            break
        inside, outside = (middle, outside) if accepts(middle) else (inside, middle)
        if not whole and abs(inside - outside) < STEP / 10:
            break
    if whole:
        return Bound(inside)
    near = round(inside, 6)
    return Bound(near, accepts(near))


def _in_words(ends: tuple[Bound, Bound], place: Place, key: str) -> str:
    lower, upper = ends
    if lower.value is None and upper.value is None:
        return ""
    if lower.value is not None and upper.value is not None:
        low, high = _number(lower.value, place, key), _number(upper.value, place, key)
        return f" in {'[' if lower.closed else '('}{low}, {high}{']' if upper.closed else ')'}"
    if lower.value is not None:
        return f" {'≥' if lower.closed else '>'} {_number(lower.value, place, key)}"
    assert upper.value is not None
    return f" {'≤' if upper.closed else '<'} {_number(upper.value, place, key)}"


def _number(value: float, place: Place, key: str) -> str:
    """A bound; by the name of the key that it depends on where there is one of that value."""
    if abs(value) > 2:
        for name, other in place.present().items():
            relations = {
                "{}": other,
                "{} - 1": other - 1,
                "{} + 1": other + 1,
                "2 · {}": 2 * other,
                "{} / 2": other / 2,
            }
            for text, found in relations.items():
                if name != key and found == value:
                    return text.format(f"`{name}`")
    return f"{value:g}"


def place_of(name: str) -> Place:
    """The place of a section or a method.

    Args:
        name: "megalr" for the keys that are no sections, "optimizer.params" for those that all optimizers have, the
            name of a section, or the "type" of a rule or a parametrization for the keys of its own.

    Raises:
        KeyError: nothing has that name.
    """
    if name == "megalr":
        return Place(GeneralConfig, ("megalr",), {}, _names(GeneralConfig))
    if name == "optimizer.params":
        keys = [key for key in _names(OptimizerConfig) if key != "rule"]
        return Place(OptimizerConfig, ("optimizer", "params"), {"optimizer": {"type": "Muon"}}, keys)
    if name == "adamw":
        return Place(GroupConfig, ("optimizer", "params", "norm"), {"optimizer": {"type": "Muon"}}, _names(GroupConfig))
    if name in SECTIONS:
        needs = {"interval": 100} if name in NEED_FACTORS else {}
        method = {"parametrization": {"type": "low_rank"}} if name in NEED_FACTORS else {}
        keys = [key for key in _names(SECTIONS[name]) if key != "type"]
        return Place(SECTIONS[name], ("megalr", name), {"megalr": {name: needs, **method}}, keys)
    rule = RULES.get(name)
    if rule is not None:
        needed = [f.name for f in dataclasses.fields(rule) if f.default is dataclasses.MISSING]
        base = {"optimizer": {"type": name, "params": dict.fromkeys(needed, 1)}}
        return Place(rule, ("optimizer", "params"), base, sorted(hyperparameters(rule), key=_own_first(rule)))
    kind = PARAMETRIZATIONS[name]
    keys = [key for key in _names(kind) if key != "type"]
    return Place(kind, ("megalr", "parametrization"), {"megalr": {"parametrization": {"type": name}}}, keys)


def _own_first(rule: type) -> Callable[[str], bool]:
    """What sorts the keys that a rule declares itself before those that it inherits."""
    own = vars(rule).get("__annotations__", {})
    return lambda key: key not in own


def _names(cls: type) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)]
