"""APOLLO: the gradient itself, scaled as Adam would scale it in a random subspace, arXiv 2412.05270."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from megalr.errors import UserError
from megalr.rules.adam_moments import adam_direction
from megalr.rules.base import Basis, Shape, State, count, tensor
from megalr.rules.checks import require_positive
from megalr.rules.fira import GROWTH_LIMIT
from megalr.rules.projected import ProjectedRule, limit_growth, project
from megalr.seeding import generator


@dataclass(frozen=True, kw_only=True)
class Apollo(ProjectedRule):
    """R = Pᵀ G,  N = Adam(R),  update = √α c L(s G / c),  s = ‖N‖ / ‖R‖ by channel or over the whole matrix.

    L limits the growth of its argument's norm to 1 % an update; c = √(1-β2^t) / (1-β1^t) is the bias correction, which
    L does not see, as in the authors' code. P is Gaussian with variance 1/r, drawn anew at every refresh; it needs no
    gradient. Channels are R's columns for a left projection, its rows for a right one. Source: arXiv 2412.05270,
    algorithm 1. Against the code: r is at most the matrix's shorter side, where the code draws a P with more columns
    than rows, whose R would be larger than G and take more memory than Adam.

    Attributes:
        scale: α; the update is multiplied by its root.
        scale_type: "channel" for one factor per row or column, "tensor" for one per matrix.
    """

    type_name: ClassVar[str] = "APOLLO"
    name: ClassVar[str] = "apollo"
    default_lr: ClassVar[float] = 1e-2
    default_eps: ClassVar[float] = 1e-6
    unused: ClassVar[frozenset[str]] = frozenset({"projector", "moments"})

    scale: float = 1.0
    scale_type: Literal["channel", "tensor"] = "channel"
    projector: Literal["random"] = "random"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(scale=self.scale)
        if self.proj_type == "full":
            raise UserError('optimizer.params.proj_type is "full", which APOLLO does not define; write "std"')

    def init_state(self, shape: Shape, device: torch.device | str = "cpu") -> State:
        return {"version": 2, **super().init_state(shape, device), "norm": torch.zeros((), device=device)}

    def room(self, numbers: Mapping[str, float], shape: Shape, device: torch.device | str) -> State:
        state = self.init_state(shape, device)
        del state["version"]  # as the numbers have it
        return state | dict(numbers)

    def state_numel(self, shape: Shape) -> int:
        return super().state_numel(shape) + 1

    def flops(self, shape: Shape) -> float:
        return 2.0 * shape[0] * shape[1] * self.rank_of(shape)

    def new_basis(self, grad: Tensor, state: State, *, updates: int, seed: int, name: str) -> Basis:
        rank = self.rank_of((grad.shape[0], grad.shape[1]))
        basis = {}
        for axis, side in enumerate(("left", "right")):
            if side in state:
                drawn = torch.randn(
                    grad.shape[axis], rank, generator=generator(seed, name, side, count(state, "refreshes"))
                )
                basis[side] = drawn.div_(math.sqrt(rank)).to(grad.device)
        return basis

    def update(self, grad: Tensor, state: State, basis: Basis | None) -> Tensor:
        self.adopt(state, basis)
        low = project(grad, state)
        direction = adam_direction(low, state, self.betas, self.eps)
        if "version" not in state:  # the last norm is of a time when the limiter saw scale and correction
            tensor(state, "norm").div_(math.sqrt(self.scale) * self._correction(count(state, "step") - 1))
            state["version"] = 2
        if self.scale_type == "tensor":
            factor = direction.norm() / (low.norm() + 1e-8)
        else:
            axis = 0 if "left" in state else 1
            factor = direction.norm(dim=axis, keepdim=True) / (low.norm(dim=axis, keepdim=True) + 1e-8)
        correction = self._correction(count(state, "step"))
        limited = limit_growth(grad * (factor / correction), state, GROWTH_LIMIT)
        return limited.mul_(correction * math.sqrt(self.scale))

    def _correction(self, step: int) -> float:
        """c after so many updates."""
        return math.sqrt(1 - self.betas[1] ** step) / (1 - self.betas[0] ** step) if step else 1.0
