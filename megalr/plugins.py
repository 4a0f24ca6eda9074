"""Methods that users add: modules whose import registers rules or parametrizations.

A module is named in the JSON, ``"megalr": {"plugins": ["my_rules.py", "my_package.rules"]}``, or by an entry point of
the group ``megalr.plugins`` in a package that is installed. Its classes carry ``@megalr.register_rule("MyRule")`` or
``@megalr.register_parametrization("my_layers")`` and are used as megalr's own are; see examples/own_rule.py and
examples/own_layers.py. A parametrization has the events of the class that it derives from, such as ReLoRA's merges, or
of its own: ``@megalr.register_events(MyConfig)`` on a class that derives from
:class:`megalr.optim.layer_events.LayerEvents`. With a method ``cut`` its layers can be split between tensor-parallel
ranks; see :class:`megalr.layers.base.Parametrization`.

A plugin is code that runs with the user's rights. So only what the user names is imported: in a JSON or a recipe on the
command line, with ``--plugins``, or by installing a package. What a folder names is shown, and never imported.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path

from megalr.errors import UserError, printable

GROUP = "megalr.plugins"
WHERE = "megalr.plugins"


def load_plugins(names: Sequence[str]) -> None:
    """Import modules that register methods, each once in a process; and those of installed packages.

    Args:
        names: modules that can be imported, or paths of ``.py`` files; the user's own words, never a folder's.

    Raises:
        UserError: a module is not there, cannot be imported, or registers a name that is taken.
    """
    _load_installed()
    for name in names:
        if not name.endswith(".py"):
            _import(name, name)
            continue
        path = Path(name).expanduser().absolute()
        if not path.is_file():
            raise UserError(f"{WHERE} names {name}, and there is no such file ({path})")
        _import_file(path)


def unknown_method(what: str, kind: object, section: object) -> UserError:
    """The error where a folder needs a method that nothing has registered; says which plugins the folder names.

    Args:
        what: the folder and its need, such as "DIR was trained with megalr.parametrization.type".
        kind: the method's name in the folder.
        section: the "megalr" section that the folder holds.
    """
    named = section.get("plugins") if isinstance(section, Mapping) else None
    names = [name for name in named if isinstance(name, str)] if isinstance(named, list | tuple) else []
    need = f"{what} {json.dumps(kind)}, which neither megalr nor an installed plugin has"
    if not names:
        return UserError(f"{need}, and names no plugin: if you have the plugin, add --plugins and its file or module")
    words = printable(shlex.join(names))
    return UserError(
        f"{need}. It names the plugins {words}. A plugin is code that runs with your rights, so it is not "
        f"imported unasked: if you trust it, add --plugins {words}"
    )


def absolute_plugin(name: str, folder: Path | None = None) -> str:
    """A plugin's name that means the same in any folder: a file's absolute path, a module's name as it is.

    Args:
        name: as the user wrote it.
        folder: where a relative path is looked for first.
    """
    if not name.endswith(".py"):
        return name
    beside = (folder or Path()) / Path(name).expanduser()
    return str((beside if beside.is_file() else Path(name).expanduser()).absolute())


def lacking(method: type, *attributes: str) -> str:
    """What a class lacks of what its base leaves to it: abstract methods, and class attributes; empty where nothing.

    Args:
        method: a rule's class, or a parametrization's.
        attributes: that the base declares without a value.
    """
    methods = sorted(getattr(method, "__abstractmethods__", ())) if inspect.isabstract(method) else []
    missing = [f"{name}()" for name in methods] + [name for name in attributes if not hasattr(method, name)]
    return ", ".join(missing)


@cache
def _load_installed() -> None:
    for point in entry_points(group=GROUP):
        _import(point.module, f"{point.module} (an entry point of {point.dist.name if point.dist else 'a package'})")


def _import(module: str, words: str) -> None:
    try:
        importlib.import_module(module)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{WHERE}: {words} cannot be imported: {type(error).__name__}: {error}") from error


def _import_file(path: Path) -> None:
    # One name for one file, so that its classes are the same however often it is named.
    module = f"megalr_plugin_{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    if module in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(module, path)
    assert spec is not None and spec.loader is not None
    sys.modules[module] = importlib.util.module_from_spec(spec)  # dataclasses look there
    try:
        spec.loader.exec_module(sys.modules[module])
    except Exception as error:
        del sys.modules[module]
        if isinstance(error, UserError):
            raise
        raise UserError(f"{WHERE}: {path} cannot be imported: {type(error).__name__}: {error}") from error
