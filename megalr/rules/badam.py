"""BAdam: Adam on one block of layers at a time, arXiv 2404.02827."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from megalr.errors import UserError
from megalr.rules.adam_moments import adam_direction, adam_state
from megalr.rules.base import Basis, Rule, Shape, State, count
from megalr.rules.checks import require_positive
from megalr.schema import check_targets
from megalr.seeding import generator

# The name up to its first number, which counts the layers: "model.layers.11" of "model.layers.11.mlp.up_proj.weight".
LAYER = re.compile(r"(?:.*?\.)??\d+(?=\.)")


@dataclass(frozen=True, kw_only=True)
class BAdam(Rule):
    """Block coordinate descent with K updates of Adam, from zero moments, as the inner solver.

    Of all blocks one is active for ``switch_interval`` updates, then another; every block has its turn before any has a
    second one. The matrices of the others rest: no update, no weight decay, no state, nothing sent. A block is a layer:
    what shares the qualified name up to its first number, and all matrices without a number together. ``blocks`` says
    otherwise. Source: arXiv 2404.02827, algorithm 1. State: Adam's, 2 m n, of the active block's matrices.

    Gradients are computed for all blocks all the same, since ZeRO reduces them; the paper's code spares those, too.
    An owner is chosen once, for all blocks, so that at ZeRO stages 1 and 2, where a layer's matrices mostly lie whole
    on one rank, that rank alone has the state and the work of the active block.

    Attributes:
        betas, eps: Adam's.
        switch_interval: K, number of updates for which one block is active.
        block_order: "random" draws a new order for each round of all blocks; "ascending" and "descending" follow the
            model.
        blocks: substrings of names. Each is one block; a matrix belongs to the first one that its name contains. The
            other matrices form one more block. None: one block for each layer.
    """

    type_name: ClassVar[str] = "BAdam"
    name: ClassVar[str] = "badam"
    reset_keys: ClassVar[tuple[str, ...]] = ("step", "exp_avg", "exp_avg_sq")
    takes_vectors: ClassVar[bool] = True
    not_in_stages: ClassVar[str] = "each stage would have an active block of its own"

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    switch_interval: int = 100
    block_order: Literal["random", "ascending", "descending"] = "random"
    blocks: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        require_positive(switch_interval=self.switch_interval)
        if self.blocks is not None:
            check_targets(self.blocks, "optimizer.params.blocks")

    def init_state(self, shape: Shape, device: torch.device | str = "cpu") -> State:
        return {"active": 0, **adam_state(shape, device)}  # "active" counts updates since the block's turn began

    def state_numel(self, shape: Shape) -> int:
        return 2 * shape[0] * shape[1]

    def flops(self, shape: Shape) -> float:
        return 10.0 * shape[0] * shape[1]

    def resting(self, names: Sequence[str], updates: int, seed: int) -> frozenset[str]:
        block_of = {name: self.block_of(name) for name in names}
        blocks = list(dict.fromkeys(block_of.values()))
        unknown = [block for block in self.blocks or () if block not in blocks]
        if unknown:
            raise UserError(
                f"optimizer.params.blocks: '{unknown[0]}' names no matrix of its own; the rule has: {', '.join(names)}"
            )
        turn, position = divmod(updates // self.switch_interval, len(blocks))
        active = blocks[self._order(len(blocks), turn, seed)[position]]
        return frozenset(name for name, block in block_of.items() if block != active)

    def block_of(self, name: str) -> str:
        """The block that a matrix belongs to; empty for the one of all that has no place elsewhere."""
        if self.blocks is not None:
            return next((block for block in self.blocks if block in name), "")
        layer = LAYER.match(name)
        return layer.group() if layer else ""

    def update(self, grad: Tensor, state: State, basis: Basis | None) -> Tensor:
        if count(state, "active") == self.switch_interval:  # the same block's turn twice in succession
            self.reset(state)
            state["active"] = 0
        state["active"] = count(state, "active") + 1
        return adam_direction(grad, state, self.betas, self.eps)

    def _order(self, blocks: int, turn: int, seed: int) -> list[int]:
        if self.block_order == "random":
            return torch.randperm(blocks, generator=generator(seed, self.name, "order", turn)).tolist()
        ascending = list(range(blocks))
        return ascending if self.block_order == "ascending" else ascending[::-1]
