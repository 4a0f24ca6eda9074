"""BAdam, arXiv 2404.02827, algorithm 1: Adam on one block at a time, as one matrix sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tests.references.common import MATRICES, Adam, Reference


class BAdam(Reference):
    """K updates of a fresh Adam whenever it is the turn of this matrix's block; nothing at all in between.

    ``names`` are those of all matrices, among them ``name``; without ``blocks`` a layer is one, by the number in names.
    """

    type_name = "BAdam"
    trained_with = {
        **MATRICES,
        "lr": 3e-3,
        "switch_interval": 2,
        "blocks": ("mlp_wide", "mlp_tall", "mlp_narrow"),
    }
    short = {"switch_interval": 4}
    on_factors = {"switch_interval": 4}  # either layer's turn has two resets in it
    rests = True
    permutation_key = "badam"  # an order of blocks is the run's, not a matrix's

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        switch_interval: int = 100,
        block_order: str = "random",
        blocks: Sequence[str] | None = None,
        name: str = "",
        names: Sequence[str] = ("",),
        permutation: Callable[[int, str, int], Tensor] | None = None,
    ) -> None:
        self.betas, self.eps = betas, eps
        self.K = switch_interval
        self.order = block_order
        self.blocks = blocks
        self.permutation = permutation
        known: list[str] = []
        for each in names:
            if self.block(each) not in known:
                known.append(self.block(each))
        self.D = len(known)
        self.index = known.index(self.block(name))
        self.t = 0

    def block(self, name: str) -> str:
        if self.blocks is not None:
            for pattern in self.blocks:
                if pattern in name:
                    return pattern
            return "rest"
        words = name.split(".")
        numbers = [i for i, word in enumerate(words[:-1]) if word.isdigit()]
        return ".".join(words[: numbers[0] + 1]) if numbers else "rest"

    def active(self, t: int) -> int:
        """The block whose turn it is after t updates."""
        epoch, position = divmod(t // self.K, self.D)
        if self.order == "random":
            assert self.permutation is not None
            return self.permutation(epoch, "order", self.D)[position].item()
        return position if self.order == "ascending" else self.D - 1 - position

    @torch.no_grad()
    def step(self, W: Tensor, G: Tensor, lr: float, weight_decay: float = 0.0) -> None:
        if self.t % self.K == 0:
            self.adam = Adam(self.betas, self.eps)
        if self.active(self.t) == self.index:
            super().step(W, G, lr, weight_decay)
        self.t += 1

    def update(self, G: Tensor) -> Tensor:
        return self.adam.direction(G)

    def reset(self) -> None:
        self.adam.reset()
