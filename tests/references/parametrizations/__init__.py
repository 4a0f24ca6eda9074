"""Every parametrization a second time, and what of it is trained in tests.

Each module has its plain layer, a :class:`~tests.references.parametrizations.common.Plain` or a training loop of its
own, and its ``CASES`` by title. A module that has ``SETTINGS`` keeps there what is looked at in fewer layouts.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys

from megalr.discovery import declared_classes
from tests.equality import Case
from tests.references.parametrizations.common import Plain

_package = sys.modules[__name__]
_modules = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]

# The plain layers by the name that the JSON's "parametrization" section gives as "type".
PLAIN: dict[str, type[Plain]] = dict(sorted(declared_classes(_package, Plain, "type_name")))
CASES: dict[str, Case] = {title: case for module in _modules for title, case in getattr(module, "CASES", {}).items()}
SETTINGS: dict[str, Case] = {
    title: case for module in _modules for title, case in getattr(module, "SETTINGS", {}).items()
}
