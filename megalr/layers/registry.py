"""The parametrizations by the name that the JSON's "parametrization" section gives as "type"."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from megalr.errors import UserError
from megalr.layers.base import FullConfig, Parametrization
from megalr.layers.cola import ColaConfig
from megalr.layers.lora import LoraConfig, ReloraConfig
from megalr.layers.loro import LoroConfig
from megalr.layers.low_rank import LowRankConfig
from megalr.layers.mora import MoraConfig
from megalr.layers.projected import ProjectedConfig
from megalr.layers.sltrain import SLTrainConfig
from megalr.layers.switchlora import SwitchLoraConfig
from megalr.plugins import lacking

PARAMETRIZATIONS: dict[str, type[FullConfig] | type[Parametrization]] = {
    "full": FullConfig,
    "low_rank": LowRankConfig,
    "lora": LoraConfig,
    "cola": ColaConfig,
    "mora": MoraConfig,
    "loro": LoroConfig,
    "switchlora": SwitchLoraConfig,
    "projected": ProjectedConfig,
    "relora": ReloraConfig,
    "sltrain": SLTrainConfig,
}

P = TypeVar("P", bound=type[Parametrization])


def register_parametrization(name: str) -> Callable[[P], P]:
    """A decorator that makes a parametrization known under a name; see :mod:`megalr.plugins`.

    Args:
        name: what ``"parametrization": {"type": ...}`` calls it.

    Raises:
        UserError: the name is taken, or what is decorated is no parametrization, or not a whole one.
    """

    def register(parametrization: P) -> P:
        if not (isinstance(parametrization, type) and issubclass(parametrization, Parametrization)):
            raise UserError(f'register_parametrization("{name}") is for classes that derive from Parametrization')
        missing = lacking(parametrization, "parts")
        if missing:
            raise UserError(
                f'register_parametrization("{name}"): {parametrization.__name__} lacks {missing}; see '
                "megalr.layers.base.Parametrization"
            )
        if name in PARAMETRIZATIONS:
            raise UserError(f'there is a parametrization called "{name}" already: choose another name')
        PARAMETRIZATIONS[name] = parametrization
        return parametrization

    return register
