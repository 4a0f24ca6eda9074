"""Adam-mini: Adam with one second moment for each output neuron, arXiv 2406.16793."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from megalr.rules.base import Basis, Rule, Shape, State, count, tensor


@dataclass(frozen=True, kw_only=True)
class AdamMini(Rule):
    """m = β1 m + (1-β1) G,  v_i = β2 v_i + (1-β2) mean_j G_ij²,  update = m̂_ij / (√v̂_i + ε).

    Source: arXiv 2406.16793, whose blocks are the smallest dense ones of the Hessian: output neurons for values,
    projections and the feed-forward part, tokens for embeddings and output head, and heads for queries and keys. Here
    every row of a matrix is a block, which is all of these but heads: those, of d rows each, have d second moments
    instead of one, a finer cut, since a rule sees a matrix without the model's number of heads. A vector is one block.
    State: m x n, and m x 1 in place of Adam's second m x n. The published code trains embeddings and head with Adam, as
    is done here unless ``"head"`` and ``"embeddings"`` say otherwise.

    Attributes:
        betas, eps: Adam's.
    """

    type_name: ClassVar[str] = "AdamMini"
    name: ClassVar[str] = "adam_mini"
    reset_keys: ClassVar[tuple[str, ...]] = ("step", "exp_avg", "exp_avg_sq")
    takes_vectors: ClassVar[bool] = True

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def init_state(self, shape: Shape, device: torch.device | str = "cpu") -> State:
        moments = {"exp_avg": torch.zeros(shape, device=device), "exp_avg_sq": torch.zeros(shape[0], 1, device=device)}
        return {"step": 0, **moments}

    def state_numel(self, shape: Shape) -> int:
        return shape[0] * shape[1] + shape[0]

    def flops(self, shape: Shape) -> float:
        return 7.0 * self.state_numel(shape)

    def update(self, grad: Tensor, state: State, basis: Basis | None) -> Tensor:
        state["step"] = step = count(state, "step") + 1
        m, v = tensor(state, "exp_avg"), tensor(state, "exp_avg_sq")
        m.lerp_(grad, 1 - self.betas[0])
        mean_square = torch.linalg.vector_norm(grad, dim=1, keepdim=True).square_().div_(grad.shape[1])
        v.lerp_(mean_square, 1 - self.betas[1])
        root = (v / (1 - self.betas[1] ** step)).sqrt_().add_(self.eps)
        return m / root.mul_(1 - self.betas[0] ** step)
