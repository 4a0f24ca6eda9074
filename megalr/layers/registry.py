"""The parametrizations by the name that the JSON's "parametrization" section gives as "type"."""

from __future__ import annotations

from megalr.layers.base import FullConfig, Parametrization
from megalr.layers.cola import ColaConfig
from megalr.layers.lora import LoraConfig, ReloraConfig
from megalr.layers.loro import LoroConfig
from megalr.layers.low_rank import LowRankConfig
from megalr.layers.mora import MoraConfig
from megalr.layers.projected import ProjectedConfig
from megalr.layers.sltrain import SLTrainConfig
from megalr.layers.switchlora import SwitchLoraConfig

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
