"""APOLLO-Mini: APOLLO with rank 1 and one scale for the whole matrix, arXiv 2412.05270."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from megalr.rules.apollo import Apollo


@dataclass(frozen=True, kw_only=True)
class ApolloMini(Apollo):
    """APOLLO with rank 1 and one factor a matrix: about as much state as SGD with momentum on one row."""

    type_name: ClassVar[str] = "APOLLOMini"
    name: ClassVar[str] = "apollo_mini"

    rank: int = 1
    scale: float = 128.0
    scale_type: Literal["channel", "tensor"] = "tensor"
