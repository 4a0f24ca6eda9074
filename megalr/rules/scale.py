"""SCALE: the gradient with normalized columns, and momentum for the last layer alone, arXiv 2506.16659."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from megalr.rules.base import Basis, Rule, Shape, State, tensor
from megalr.rules.checks import require_decay
from megalr.rules.scaling import unit


@dataclass(frozen=True, kw_only=True)
class SCALE(Rule):
    """update_ij = G_ij / rms(G_i:), which needs no state; of the output head the same with M = μ M + (1-μ) G for G.

    Source: arXiv 2506.16659 and its code. A column is what the paper calls the gradients of one output, in matrices
    written as (in, out): here, as in torch, where matrices are (out, in), it is a row. Of an embedding, (vocabulary,
    width), it is what all tokens have in one place of the width. The root mean square is taken, not the norm, as in the
    code: entries are of size 1, so that learning rates are of the size of Adam's. The code divides by at least 1e-8,
    here as in the paper there is no such bound, and a column of zeros stays zero.

    The paper's method needs ``"head": true, "embeddings": true`` in ``optimizer.params``, which give the rule the head,
    with its momentum of m x n, and the embeddings; otherwise both are AdamW's.

    Attributes:
        momentum: μ, the decay of the output head's momentum.
    """

    type_name: ClassVar[str] = "SCALE"
    name: ClassVar[str] = "scale"
    reset_keys: ClassVar[tuple[str, ...]] = ("momentum_buffer",)
    axis: ClassVar[int] = 1  # along which an output's gradients lie

    momentum: float = 0.9

    def __post_init__(self) -> None:
        require_decay(momentum=self.momentum)

    def for_head(self) -> Rule:
        return SCALEOfHead(**vars(self))

    def for_embedding(self) -> Rule:
        return SCALEOfEmbedding(**vars(self))

    def init_state(self, shape: Shape, device: torch.device | str = "cpu") -> State:
        return {}

    def state_numel(self, shape: Shape) -> int:
        return 0

    def flops(self, shape: Shape) -> float:
        return 3.0 * shape[0] * shape[1]

    def reset(self, state: State) -> None:
        """Nothing, where there is no momentum."""

    def update(self, grad: Tensor, state: State, basis: Basis | None) -> Tensor:
        return unit(grad, self.axis).mul_(grad.shape[self.axis] ** 0.5)


@dataclass(frozen=True, kw_only=True)
class SCALEOfEmbedding(SCALE):
    """The columns of an embedding."""

    axis: ClassVar[int] = 0


@dataclass(frozen=True, kw_only=True)
class SCALEOfHead(SCALE):
    """The columns of the momentum."""

    def init_state(self, shape: Shape, device: torch.device | str = "cpu") -> State:
        return {"momentum_buffer": torch.zeros(shape, device=device)}

    def state_numel(self, shape: Shape) -> int:
        return shape[0] * shape[1]

    def reset(self, state: State) -> None:
        Rule.reset(self, state)

    def update(self, grad: Tensor, state: State, basis: Basis | None) -> Tensor:
        return super().update(tensor(state, "momentum_buffer").lerp_(grad, 1 - self.momentum), state, basis)
