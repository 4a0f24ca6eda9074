"""The exceptions that mean: something cannot go on as the user has it, and the message says what to do."""

from __future__ import annotations

from collections.abc import Sequence


class UserError(ValueError):
    """A mistake in a configuration, a flag or a file, worded for the person who made it.

    Launchers print the message alone, on rank 0, and exit with code 2; a library user sees an ordinary ``ValueError``.
    """


class GuardError(UserError):
    """A guard stops the run; raised on all ranks alike, at the end of the same update."""


def in_short(error: Exception) -> str:
    """An error's words, of pydantic's those that name a key and say what is wrong with it."""
    if hasattr(error, "errors"):
        found = [f'"{".".join(map(str, each["loc"]))}": {each["msg"]}' for each in error.errors()]
        return f"{getattr(error, 'title', '')}: {'; '.join(found)}"
    return str(error)


def printable(text: str) -> str:
    """Text of others for a terminal: control characters, which could rewrite the line, as Python writes them."""
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)


def some_of(items: Sequence[str], most: int = 3, between: str = ", ") -> str:
    """The first items for a message, and how many more there are."""
    more = len(items) - most
    shown = between.join(items[:most])
    return shown if more <= 0 else f"{shown}{between.replace(',', '')}and {more} more"
