"""The methods that the package brings: classes that declare under which name they are known."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType
from typing import Any


def declared_classes(package: ModuleType, base: type, attribute: str) -> list[tuple[Any, Any]]:
    """What the classes of a package declare, with the classes, in the order of modules and of lines.

    Every module of the package is imported, so that adding a file adds a method. A class counts in the module that
    defines it, and where the declaration is its own: a subclass that says nothing is no method of its own.

    Args:
        package: without its subpackages.
        base: what the classes derive from.
        attribute: what they declare; an empty value declares nothing.
    """
    found = []
    for name in sorted(info.name for info in pkgutil.iter_modules(package.__path__) if not info.ispkg):
        module = importlib.import_module(f"{package.__name__}.{name}")
        for cls in vars(module).values():
            if isinstance(cls, type) and issubclass(cls, base) and cls.__module__ == module.__name__:
                declaration = vars(cls).get(attribute)
                if declaration:
                    found.append((declaration, cls))
    return found
