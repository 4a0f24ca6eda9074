"""GoLore: GaLore with random bases late in training, arXiv 2410.11289."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from megalr.errors import UserError
from megalr.rules.bases import Projector
from megalr.rules.galore import GaLore
from megalr.rules.projected import Moments


@dataclass(frozen=True, kw_only=True)
class GoLore(GaLore):
    """GaLore whose bases are uniformly random once ``random_from`` updates have been made.

    Late in training the gradient's leading subspace is mostly noise, and GaLore need not converge; a random one keeps
    every direction alive. Source: arXiv 2410.11289. The first moment is carried into the new basis, the second is kept,
    as the authors have it (their AdamW class computes the rotated moment and drops it).

    Attributes:
        random_from: number of updates after which refreshes draw random bases; 0 for all. The paper uses the last part
            of the run.
    """

    type_name: ClassVar[str] = "GoLoreAdamW"
    name: ClassVar[str] = "golore"
    former_defaults: ClassVar[Mapping[str, object]] = {"moments": "transport"}

    random_from: int
    moments: Moments = "transport_first"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.random_from < 0:
            raise UserError(f"optimizer.params.random_from is {self.random_from}; write a number of updates, 0 or more")

    def projector_at(self, updates: int) -> Projector:
        return "random" if updates >= self.random_from else self.projector
