"""The events of parametrizations that have some, by the parametrization's type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from megalr.layers.base import ParametrizationConfig
from megalr.optim.layer_events import LayerEvents
from megalr.optim.merges import Merges
from megalr.optim.projection import Projections
from megalr.optim.riemannian import RiemannianSteps
from megalr.optim.switches import Switches

EVENTS: dict[str, Any] = {
    "projected": Projections,
    "relora": Merges,
    "loro": RiemannianSteps,
    "switchlora": Switches,
}


def layer_events(config: ParametrizationConfig, layers: Mapping[str, nn.Module], seed: int) -> LayerEvents | None:
    """The events of a model's replaced layers; None where the parametrization has none, or nothing was replaced.

    Args:
        config: the "parametrization" section.
        layers: the replaced layers by qualified name.
        seed: key of random numbers.
    """
    if config.type not in EVENTS or not layers:
        return None
    events: LayerEvents = EVENTS[config.type](layers, config, seed)
    return events
