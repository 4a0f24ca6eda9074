"""What the command lines of all programs have in common."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NoReturn

from megalr.errors import UserError

_typed: ContextVar[str] = ContextVar("_typed", default="")


@contextmanager
def typed_as(program: str) -> Iterator[None]:
    """A block in which help and errors name the program as the user typed it, such as ``megalr plan``."""
    token = _typed.set(program)
    try:
        yield
    finally:
        _typed.reset(token)


class PlainParser(argparse.ArgumentParser):
    """argparse whose complaints are a :class:`~megalr.errors.UserError`, so that one rank speaks for all."""

    def __init__(self, prog: str | None = None, **kwargs: Any) -> None:
        typed = _typed.get()
        is_subcommand = prog is not None and prog.startswith(typed)  # argparse begins it with its parent's
        super().__init__(prog=prog if is_subcommand else typed or prog, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print."""
        raise UserError(f"{message}\n(`{self.prog} --help` lists the flags)")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuse ``--flag=--``, of which argparse loses the value, and then its way."""
        words: Sequence[str] = sys.argv[1:] if args is None else args
        for word in words:
            if word.startswith("--") and word.endswith("=--"):
                self.error(f"argument {word.removesuffix('=--')}: expected a value, not --")
        return super().parse_known_args(args, namespace)


def positive(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return number


def positive_float(text: str) -> float:
    """An argparse type: a finite number above 0."""
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def nonempty(text: str) -> str:
    """An argparse type: a name or a path; the empty one would be the folder that one is in."""
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError("expected a name, found an empty one")
    return text


def path(text: str) -> Path:
    """An argparse type: :func:`nonempty`, as a path."""
    return Path(nonempty(text))
