"""The typed view of the DeepSpeed JSON: its "optimizer" and "megalr" sections.

Everything else in the file is DeepSpeed's and is passed on untouched. A section is a frozen dataclass; a key that is
not a field, a value of another type or out of range is a :class:`~megalr.errors.UserError` that says what to write.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from megalr.config.compatibility import check_compatible
from megalr.config.guards import GuardsConfig
from megalr.config.reading import fill_auto, read_json, read_sections
from megalr.config.sections import (
    GeneralConfig,
    GroupConfig,
    MomentumResetConfig,
    OptimizerConfig,
    RefactorizationConfig,
)
from megalr.layers.base import FullConfig, ParametrizationConfig
from megalr.layers.low_rank import LowRankConfig
from megalr.layers.projected import ProjectedConfig
from megalr.layers.velora import VeloraConfig
from megalr.schema import Json

__all__ = [
    "FullConfig",
    "GroupConfig",
    "GuardsConfig",
    "Json",
    "LowRankConfig",
    "MegalrConfig",
    "MomentumResetConfig",
    "OptimizerConfig",
    "ParametrizationConfig",
    "ProjectedConfig",
    "RefactorizationConfig",
    "VeloraConfig",
    "fill_auto",
    "read_json",
]


@dataclass(frozen=True, kw_only=True)
class MegalrConfig(GeneralConfig):
    """All that megalr reads from the JSON: sections, and the values that stand beside them."""

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parametrization: ParametrizationConfig = field(default_factory=FullConfig)
    refactorization: RefactorizationConfig | None = None
    momentum_reset: MomentumResetConfig | None = None
    activations: VeloraConfig | None = None
    guards: GuardsConfig = field(default_factory=GuardsConfig)

    def __post_init__(self) -> None:
        check_compatible(self)
        super().__post_init__()

    @classmethod
    def from_json(cls, config: Json | str | Path) -> MegalrConfig:
        """Read the "optimizer" and "megalr" sections of a DeepSpeed configuration.

        The optimizer may also stand inside the "megalr" section, out of DeepSpeed's and transformers' sight, for jobs
        in which those read the file as well.

        Args:
            config: the file's path, or its content.

        Raises:
            UserError: for anything that is not valid, before anything is built.
        """
        return cls(**read_sections(read_json(config)))
