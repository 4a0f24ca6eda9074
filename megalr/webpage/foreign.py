"""Values from files that anybody may have written: numbers that are numbers, and text that is no markup."""

from __future__ import annotations

import html
import math
from pathlib import Path
from typing import Any

from megalr.checkpoint.inputs import check_depth, parse, read_inside
from megalr.errors import printable

LARGEST_JSON = 1 << 24  # bytes of run.json or summary.json
LARGEST_WHOLE = 1 << 63
LONGEST = 300  # characters of one name or reason


def number(value: Any) -> float:
    """A number of JSON as a float, which may be infinite; NaN for anything else, true and false included."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    return math.nan if isinstance(value, int) and abs(value) >= LARGEST_WHOLE else float(value)


def finite(value: Any) -> float | None:
    """The same; None unless it is finite."""
    found = number(value)
    return found if math.isfinite(found) else None


def escaped(value: Any, longest: int = LONGEST) -> str:
    """Text for HTML, between tags or in a quoted attribute, shortened if it is long."""
    text = str(value).encode(errors="replace").decode()  # a folder's name may be no text
    text = text if len(text) <= longest else f"{text[:longest]}…"
    return html.escape("\n".join(printable(line) for line in text.split("\n")))


def read_object(folder: Path, name: str) -> tuple[dict[str, Any], str]:
    """A JSON object of a folder, read in bounded time and memory.

    Returns:
        The object and ``""``, or an empty object and the reason why it cannot be read.
    """
    try:
        content = parse(read_inside(folder, name, LARGEST_JSON))
        check_depth(content)
    except FileNotFoundError:
        return {}, f"{name} is missing"
    except OSError as error:
        return {}, f"{name} cannot be read: {error.strerror or error}"
    except ValueError as error:
        return {}, f"{name} is damaged: {str(error)[:LONGEST]}"
    return (content, "") if isinstance(content, dict) else ({}, f"{name} holds no JSON object")
