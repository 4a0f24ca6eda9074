"""The parametrizations by the name that the JSON's "parametrization" section gives as "type".

The package's own are found: every configuration in :mod:`megalr.layers` that declares a ``type``. Users
register theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import megalr.layers
from megalr.discovery import declared_classes
from megalr.errors import UserError
from megalr.layers.base import FullConfig, Parametrization
from megalr.plugins import lacking

PARAMETRIZATIONS: dict[str, type[FullConfig] | type[Parametrization]] = {"full": FullConfig}

P = TypeVar("P", bound=type[Parametrization])


def register_parametrization(name: str) -> Callable[[P], P]:
    """Return a decorator that adds a parametrization under a name; see :mod:`megalr.plugins`.

    Args:
        name: its name in ``"parametrization": {"type": ...}``.

    Raises:
        UserError: the name is taken, or the decorated class is not a complete parametrization.
    """

    def register(parametrization: P) -> P:
        if not (isinstance(parametrization, type) and issubclass(parametrization, Parametrization)):
            raise UserError(
                f'register_parametrization("{name}") needs a class that derives from '
                f"megalr.layers.base.Parametrization, not {parametrization!r}"
            )
        missing = lacking(parametrization, "parts")
        if missing:
            raise UserError(
                f'register_parametrization("{name}"): {parametrization.__name__} lacks {missing}; see '
                "megalr.layers.base.Parametrization"
            )
        if name in PARAMETRIZATIONS:
            raise UserError(
                f'there is a parametrization called "{name}" already: choose another name than '
                f"{', '.join(PARAMETRIZATIONS)}"
            )
        PARAMETRIZATIONS[name] = parametrization
        return parametrization

    return register


for _name, _config in sorted(declared_classes(megalr.layers, Parametrization, "type")):
    register_parametrization(_name)(_config)
