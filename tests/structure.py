"""What source files say without being imported: modules of a package, imports, attributes."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "megalr"
HOSTS = "hosts"


@dataclass(frozen=True)
class Module:
    """A source file of megalr.

    Attributes:
        file: where it is in the package, as "optim/clock.py".
        tree: its syntax tree.
    """

    file: str
    tree: ast.Module

    @property
    def name(self) -> str:
        """Its dotted name, "megalr" included."""
        return ".".join(part for part in ("megalr", *self.file[: -len(".py")].split("/")) if part != "__init__")

    @property
    def top(self) -> str:
        """The package or module right below megalr; "megalr" for the package itself."""
        return self.name.split(".")[1] if "." in self.name else "megalr"


@cache
def sources() -> tuple[Module, ...]:
    """All source files of megalr."""
    paths = sorted(PACKAGE.rglob("*.py"))
    return tuple(Module(path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text("utf-8"))) for path in paths)


def with_planted(file: str, text: str, *, anew: bool = False) -> tuple[Module, ...]:
    """The same with something at the end of one file, or as a new one, or in the place of all that it has."""
    others = tuple(module for module in sources() if module.file != file)
    before = [] if anew else [node for module in sources() if module.file == file for node in module.tree.body]
    return *others, Module(file, ast.Module([*before, *ast.parse(text).body], []))


def imported(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Dotted names of everything that is imported anywhere, and the lines; of `from` imports with what they take."""
    for node in ast.walk(tree):
        match node:
            case ast.Import():
                yield from ((alias.name, node.lineno) for alias in node.names)
            case ast.ImportFrom(module=str(module), level=0):
                yield from ((f"{module}.{alias.name}", node.lineno) for alias in node.names)
            case ast.Call(func=func, args=[ast.Constant(value=str(name)), *_]):
                if last_name(func) in ("import_module", "__import__"):
                    yield name, node.lineno


def attributes(tree: ast.AST) -> Iterator[tuple[str, str, int]]:
    """Attributes that are read or written: the object's last name, the attribute, the line.

    Strings that are given to getattr, hasattr, setattr and delattr count.
    """
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=value, attr=name):
                yield last_name(value), name, node.lineno
            case ast.Call(func=func, args=[value, ast.Constant(value=str(name)), *_]):
                if last_name(func) in ("getattr", "hasattr", "setattr", "delattr"):
                    yield last_name(value), name, node.lineno


def last_name(node: ast.AST) -> str:
    """Of ``a.b.c`` "c"; empty for what has no name."""
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
    return ""


def tables() -> dict[str, Mapping[str, tuple[str, ...]]]:
    """What each file of hosts/ declares that it reads of an engine: attributes, by whose they are."""
    found = {}
    for path in sorted((PACKAGE / HOSTS).glob("*.py")):
        if path.stem != "__init__":
            module = importlib.import_module(f"megalr.{HOSTS}.{path.stem}")
            found[path.name] = getattr(module, "INTERNALS", {})
    return found
