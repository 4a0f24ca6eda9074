"""The JSON as text and as values: what every reader of it refuses before a section has been looked at.

JSON readers forgive much: of a key that is given twice the last value counts, NaN is a number, ``"false"`` is true.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megalr.config import values
from megalr.config.secrets import is_secret
from megalr.config.values import short
from megalr.errors import UserError
from megalr.schema import Json

MOST_DIGITS = 4000  # of a number; Python converts no more than 4,300
LARGEST = 2**63  # whole numbers are below it, in DeepSpeed as in torch
DEEPEST = 100  # objects and lists inside each other; DeepSpeed's own sections have four
WRITTEN = {"true": "true", "false": "false", "yes": "true", "no": "false", "on": "true", "off": "false"}
FREE_TEXT = ("megalr.plugins", "tensorboard", "csv_monitor", "wandb", "comet")  # whose strings may be any word


def parse(text: str, name: str) -> dict[str, Any]:
    """A JSON object from text.

    Args:
        text: of the file.
        name: of the file, for messages.

    Raises:
        UserError: it is no JSON, or no object; a key is given twice; a number or the nesting is beyond reading.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                both = "" if is_secret(key, value) else f", {short(found[key])} and {short(value)}"
                raise UserError(f'{name} has "{key}" twice in one object{both}: remove one')
            found[key] = value
        return found

    def whole(digits: str) -> int:
        if len(digits) > MOST_DIGITS:
            line = text.count("\n", 0, text.find(digits)) + 1
            raise UserError(
                f"{name}, line {line}, has a number of {len(digits):,} digits, {digits[:20]}...: shorten it"
            )
        return int(digits)

    try:
        content = json.loads(text.removeprefix("\ufeff"), object_pairs_hook=once, parse_int=whole)
    except UserError:
        raise
    except RecursionError:
        raise UserError(f"{name} is not valid JSON: its brackets lie too deep inside each other") from None
    except ValueError as error:
        raise UserError(f"{name} is not valid JSON: {str(error)[:200]}") from error
    if not isinstance(content, dict):
        raise UserError(f"{name} must hold a JSON object, not a {type(content).__name__}")
    return content


def read(path: Path) -> dict[str, Any]:
    """:func:`parse` of a file."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not valid JSON: byte {error.start} is not UTF-8") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    return parse(text, str(path))


def check_values(content: Json) -> None:
    """Refuse values that DeepSpeed or Python would take for something else than what is written.

    Args:
        content: the whole configuration, however it was read; "auto" is left to whoever resolves it.

    Raises:
        UserError: names the key, what it is, and what to write.
    """
    for where, value in _leaves(content, ""):
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{where} is {json.dumps(value)}: write a finite number, or leave the line out")
        if isinstance(value, int) and abs(value) >= LARGEST:
            digits = int(value.bit_length() * math.log10(2)) + 1  # str() refuses the longest
            raise UserError(f"{where} is a whole number of {digits:,} digits: write one below 2**63")
        word = isinstance(value, str) and not where.startswith(FREE_TEXT) and not where.endswith("]")
        if word and value.lower() in WRITTEN:
            raise UserError(f'{where} is "{value}", a string: write {WRITTEN[value.lower()]}, without quotation marks')
    values.check(content)


def _leaves(value: Any, where: str, depth: int = 0) -> Iterator[tuple[str, Any]]:
    if depth > DEEPEST:
        raise UserError(f"{where[:60]}... lies deeper than {DEEPEST} objects and lists inside each other")
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{where}.{key}" if where else str(key), depth + 1)
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _leaves(inner, f"{where}[{index}]", depth + 1)
    else:
        yield where, value
