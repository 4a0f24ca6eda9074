"""GaLore: Adam in the leading singular subspace of the gradient, arXiv 2403.03507."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from megalr.rules.adam_moments import adam_direction
from megalr.rules.base import Basis, Shape, State
from megalr.rules.checks import require_positive
from megalr.rules.projected import ProjectedRule, factors_back, project, project_back
from megalr.rules.quantized_state import fp32_state


@dataclass(frozen=True, kw_only=True)
class GaLore(ProjectedRule):
    """R = Pᵀ G,  N = Adam(R),  update = α P N, with P the leading singular vectors of a gradient of the past.

    Source: arXiv 2403.03507, algorithm 2. Against the package galore-torch: ε is added to √v̂ as in Adam, not to √v
    before its bias correction; weight decay acts on W as it was before the update.

    Attributes:
        scale: α, the factor on the update.
    """

    type_name: ClassVar[str] = "GaLoreAdamW"
    name: ClassVar[str] = "galore"
    default_lr: ClassVar[float] = 1e-2
    default_eps: ClassVar[float] = 1e-6

    scale: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(scale=self.scale)

    def update(self, grad: Tensor, state: State, basis: Basis | None) -> Tensor:
        return project_back(self._low_update(grad, state, basis), state)

    def apply(self, weight: Tensor, grad: Tensor, state: State, basis: Basis | None, *, lr: float) -> None:
        # The product goes straight into W: no m x n temporary, and one pass over W instead of three.
        left, right = factors_back(self._low_update(grad, state, basis), state)
        weight.addmm_(left, right, alpha=-lr)

    def convert(self, state: State, shape: Shape) -> State:
        plain = fp32_state(self, state, shape)
        return {key: value.contiguous() if isinstance(value, Tensor) else value for key, value in plain.items()}

    def _low_update(self, grad: Tensor, state: State, basis: Basis | None) -> Tensor:
        """α N: (r, n), (m, r) or (r, r)."""
        self.adopt(state, basis)
        low = project(grad, state)
        return adam_direction(low, state, self.betas, self.eps, self.scale)
