"""The events of parametrizations that have some, by the parametrization's class; its subclasses have them, too.

The package's own are found: every class in :mod:`megalr.optim.events` that names its ``parametrization``. Users
register theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from torch import nn

import megalr.optim.events
from megalr.discovery import declared_classes
from megalr.errors import UserError
from megalr.layers.base import Parametrization, ParametrizationConfig
from megalr.layers.replacement import half_frozen
from megalr.optim.events.base import LayerEvents

EVENTS: dict[type, type[LayerEvents]] = {}

E = TypeVar("E", bound=type[LayerEvents])


def register_events(parametrization: type[Parametrization]) -> Callable[[E], E]:
    """Return a decorator that gives a parametrization events of its own; see :mod:`megalr.plugins`.

    The decorated class is called with the layers, the configuration and the seed. It takes the place of the events
    that the parametrization would have from its parent class.

    Args:
        parametrization: the configuration's class.

    Raises:
        UserError: the parametrization has events already, or one of the two is no such class.
    """

    def register(events: E) -> E:
        if not (isinstance(parametrization, type) and issubclass(parametrization, Parametrization)):
            raise UserError(f"register_events needs a class that derives from Parametrization, not {parametrization!r}")
        if not (isinstance(events, type) and issubclass(events, LayerEvents)):
            raise UserError(
                f"register_events({parametrization.__name__}) is for classes that derive from "
                f"megalr.optim.layer_events.LayerEvents, not {events!r}"
            )
        own = [name for name in ("state_dict", "load_state_dict") if hasattr(events, name)]
        if own:
            raise UserError(
                f"{events.__name__} defines {own[0]}, which nothing calls: give counts by numbers() and "
                "load_numbers(), and tensors by entries() and make_room(); see megalr.optim.layer_events.LayerEvents"
            )
        if parametrization in EVENTS:
            raise UserError(
                f"{parametrization.__name__} has the events {EVENTS[parametrization].__name__} already: derive a "
                "parametrization from it, and give that one yours"
            )
        EVENTS[parametrization] = events
        return events

    return register


def layer_events(config: ParametrizationConfig, layers: Mapping[str, nn.Module], seed: int) -> LayerEvents | None:
    """The events of a model's replaced layers; None where the parametrization has none, or nothing was replaced.

    Args:
        config: the "parametrization" section.
        layers: the replaced layers by qualified name.
        seed: key of random numbers.

    Raises:
        UserError: the events would change a frozen tensor, or one that the optimizer trains besides.
    """
    chosen = _events_of(config)
    if chosen is None or not layers:
        return None
    if chosen.rewrites:
        _refuse_half_frozen(layers, chosen.rewrites)
    create: Callable[..., LayerEvents] = chosen  # each declares the class of its own configuration
    events = create(layers, config, seed)
    _refuse_trained_twice(events)
    return events


def has_events(config: ParametrizationConfig) -> bool:
    """Whether the layers of a parametrization need events."""
    return _events_of(config) is not None


def _refuse_half_frozen(layers: Mapping[str, nn.Module], rewrites: str) -> None:
    for name, (frozen, trained) in half_frozen(layers).items():
        raise UserError(
            f"{name}.{frozen} is frozen (requires_grad is False), and {name}.{trained} is trained, but {rewrites}. "
            "Freeze both factors, which then stay as they are, or train both"
        )


def _refuse_trained_twice(events: LayerEvents) -> None:
    """Refuse what events write and the optimizer trains: an engine would overwrite the one with the other."""
    for name, tensor in events.written().items():
        if tensor.requires_grad:
            raise UserError(
                f"{name} is trained (requires_grad is True), and {type(events).__name__.lower()} of the layer write it "
                "themselves: call requires_grad_(False) on it, as megalr.parametrize has left it"
            )


def _events_of(config: ParametrizationConfig) -> type[LayerEvents] | None:
    return next((EVENTS[cls] for cls in type(config).__mro__ if cls in EVENTS), None)


for _parametrization, _events in declared_classes(megalr.optim.events, LayerEvents, "parametrization"):
    register_events(_parametrization)(_events)
