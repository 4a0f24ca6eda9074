"""The parsers of every program, and their help as Markdown.

A parser is caught as its program makes it: the program is run with ``--help`` until it parses.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import runpy
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class _Caught(Exception):
    """Carries the parser that a program has made."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        super().__init__()
        self.parser = parser


@cache
def programs() -> dict[str, Callable[[], Any]]:
    """What starts each program, by the words that a user types."""
    found: dict[str, Callable[[], Any]] = {}
    for name in commands():
        found[f"megalr {name}"] = _commands_main
    if importlib.util.find_spec("megalr.pretrain") is not None:
        found["megalr.pretrain"] = lambda: runpy.run_module("megalr.pretrain", run_name="__main__")
    for script in sorted((ROOT / "launchers").glob("*.py")):
        found[f"launchers/{script.name}"] = lambda script=script: runpy.run_path(str(script), run_name="__main__")
    found["megalr.checkpoint"] = lambda: runpy.run_module("megalr.checkpoint", run_name="__main__")
    return found


def commands() -> list[str]:
    """The subcommands of ``megalr``; none where the package has no such command."""
    if importlib.util.find_spec("megalr.commands") is None:
        return []
    return list(importlib.import_module("megalr.commands").COMMANDS)


def _commands_main() -> Any:
    return importlib.import_module("megalr.commands").main(sys.argv[1:])


def launch_parser() -> argparse.ArgumentParser | None:
    """The parser of what ``megalr pretrain`` tells the launcher that it starts; None without that command."""
    if not commands():
        return None
    made: argparse.ArgumentParser = importlib.import_module("megalr.commands")._launch_parser()
    return made


@cache
def parser_of(program: str) -> argparse.ArgumentParser:
    """The argument parser of a program.

    Args:
        program: one of :func:`programs`.

    Raises:
        LookupError: the program has ended without parsing anything.
    """
    start, words = programs()[program], program.split()[1:]
    with _as_program([program, *words, "--help"]), _catching():
        try:
            start()
        except _Caught as caught:
            return caught.parser
    raise LookupError(f"{program} --help parses nothing")


@contextmanager
def _as_program(argv: Sequence[str]) -> Iterator[None]:
    before = sys.argv, list(sys.path)
    sys.argv = list(argv)
    try:
        yield
    finally:
        sys.argv, sys.path[:] = before


@contextmanager
def _catching() -> Iterator[None]:
    plain = argparse.ArgumentParser.parse_known_args

    def catch(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> Any:
        if self.add_help:
            raise _Caught(self)
        return plain(self, *args, **kwargs)  # of a parser that looks for one flag before the program's own is made

    argparse.ArgumentParser.parse_known_args = catch  # type: ignore[method-assign]
    try:
        yield
    finally:
        argparse.ArgumentParser.parse_known_args = plain  # type: ignore[method-assign]


def help_of(parser: argparse.ArgumentParser) -> str:
    """Usage, description and options of a parser as Markdown, subcommands included."""
    usage = " ".join(parser.format_usage().removeprefix("usage: ").split())
    parts = [_paragraphs(parser.description), f"```text\n{_wrapped(usage)}\n```" if usage else ""]
    nested: dict[str, argparse.ArgumentParser] = {}
    for group in parser._action_groups:
        shown = [action for action in group._group_actions if action.help != argparse.SUPPRESS]
        commands = [action for action in shown if isinstance(action, argparse._SubParsersAction)]
        for action in commands:
            nested |= action.choices
        lines = [_option(parser, action) for action in shown if action not in commands and action.dest != "help"]
        if lines:
            titled = group.title not in ("options", "positional arguments")
            parts += [f"**{group.title}**", _paragraphs(group.description)] if titled else []
            parts += lines
    parts.append(_paragraphs(parser.epilog))
    for name, child in nested.items():
        parts += [f"```{{rubric}} {name}\n```", help_of(child)]
    return "\n\n".join(part for part in parts if part)


def _option(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    """An entry of a definition list: the flags with their values, and the meaning."""
    value = parser._get_formatter()._format_args(action, action.dest.upper()) if action.nargs != 0 else ""
    names = ", ".join(action.option_strings) or value
    flag = f"{names} {value}".strip() if action.option_strings else names
    text = (action.help or "") % {**vars(action), "prog": parser.prog} if action.help else ""
    options = [] if action.choices is None or "{" in flag else list(map(str, action.choices))
    named = all(option in text for option in options)
    choices = "" if named else f" One of: {', '.join(f'`{option}`' for option in options)}."
    default = action.default
    shown = default not in (None, False, argparse.SUPPRESS) and "default" not in text and not isinstance(default, list)
    said = f" Default: `{default}`." if shown and action.nargs != 0 and isinstance(default, int | float | str) else ""
    return f"`{flag}`\n: {_escaped(text).rstrip('.')}.{choices}{said}"


def _escaped(text: str) -> str:
    """Help text as Markdown: stars, brackets and angles are themselves."""
    pieces = text.split("`")  # what stands between backticks stays
    for index in range(0, len(pieces), 2):
        for sign in "\\*_[]<>|$":
            pieces[index] = pieces[index].replace(sign, f"\\{sign}")
    return "`".join(pieces)


def _paragraphs(text: str | None) -> str:
    """A description: paragraphs, with lines that are commands as code."""
    blocks = []
    for block in (text or "").strip().split("\n\n"):
        is_code = block.lstrip().startswith(("python ", "deepspeed ", "torchrun ", "megalr "))
        blocks.append(f"```sh\n{block}\n```" if is_code else _escaped(" ".join(block.split())))
    return "\n\n".join(block for block in blocks if block)


def _wrapped(usage: str, width: int = 100) -> str:
    """A usage line, broken before options."""
    words, lines = usage.replace("] [", "]\0[").split("\0"), [""]
    for word in words:
        if len(lines[-1]) + len(word) + 1 > width and lines[-1]:
            lines.append("    " + word)
        else:
            lines[-1] = f"{lines[-1]} {word}".strip() if len(lines) == 1 else f"{lines[-1]} {word}"
    return "\n".join(lines)
