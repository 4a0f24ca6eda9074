"""Refactorization of the LLaMA-1B set of pairs: the op, two routes in torch's calls, the SVD of the product."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.timing import take_turns
from megalr.formatting import markdown_table
from megalr.ops import refactorize_
from megalr.train.models import read_model_config

TITLE = "Refactorization of the 1B shape's pairs, rank 512"
RANK = 512
OP, SVD = "megalr::refactorize", "SVD of the product B·A"
ROUTE = "QR in fp32 and SVD of the core in fp64, by torch, pair by pair"
SAME = "the op's own route (Gram, Cholesky, eigh) by torch, pair by pair"
# Aims: the op against these two.
AGAINST_ROUTE, AGAINST_SVD = 1.3, 12.0


def measure(arguments: argparse.Namespace, models: Path) -> dict[str, list[float]]:
    """Seconds of each layer's seven pairs; of the SVD of the product, for one layer, since it takes minutes."""
    config = read_model_config("1b", models)
    layers = [Layer(config.hidden_size, config.intermediate_size, seed) for seed in range(arguments.layers)]
    turn = _Turn(layers)
    Layer(64, 96, 0, rank=16).by_op()  # loads what is loaded at first use
    ways = {OP: Layer.by_op, ROUTE: Layer.by_qr, SAME: Layer.by_gram}
    seconds = take_turns({name: _By(turn, way) for name, way in ways.items()}, len(layers), turn.prepare)
    begin = time.perf_counter()
    Layer(config.hidden_size, config.intermediate_size, 0).by_svd()
    return {**seconds, SVD: [time.perf_counter() - begin]}


def report(seconds: Mapping[str, Sequence[float]]) -> str:
    """The table."""
    medians = {name: float(np.median(taken)) for name, taken in seconds.items()}
    aims = {ROUTE: f"{AGAINST_ROUTE}", SVD: f"{AGAINST_SVD:g}"}
    rows = [
        [name, str(len(seconds[name])), f"{median:.2f}", f"{median / medians[OP]:.2f}", aims.get(name, "")]
        for name, median in medians.items()
    ]
    return markdown_table(("way", "layers timed", "median s a layer", "/ op", "aim, at least"), rows)


class Layer:
    """The seven pairs of one layer, with singular values that fall off."""

    def __init__(self, hidden: int, intermediate: int, seed: int, rank: int = RANK) -> None:
        """
        Args:
            hidden, intermediate: the model's sizes.
            seed: of the numbers.
            rank: r.
        """
        random = torch.Generator().manual_seed(seed)
        shapes = [(hidden, hidden)] * 4 + [(intermediate, hidden)] * 2 + [(hidden, intermediate)]
        falling = torch.logspace(0, -2, rank)
        self.pairs: list[tuple[Tensor, Tensor]] = [
            (torch.randn(m, rank, generator=random) * falling, torch.randn(rank, n, generator=random))
            for m, n in shapes
        ]

    def by_op(self) -> None:
        """All pairs in one call, in place."""
        refactorize_([b for b, _ in self.pairs], [a for _, a in self.pairs])

    def by_qr(self) -> None:
        """Thin QR decompositions and products in fp32, and an r x r core in fp64."""
        for b, a in self.pairs:
            q_b, r_b = torch.linalg.qr(b)
            q_a, r_a = torch.linalg.qr(a.T)
            u, s, vh = torch.linalg.svd(r_b.double() @ r_a.double().T)
            root = s.sqrt()
            torch.mm(q_b, (u * root).float(), out=b)
            torch.mm((root[:, None] * vh).float(), q_a.T, out=a)

    def by_gram(self) -> None:
        """What csrc/refactorize.cpp does, without its checks and its bound of memory."""
        for b, a in self.pairs:
            wide_b, wide_a = b.double(), a.double()
            factor = torch.linalg.cholesky(wide_a @ wide_a.T)
            values, v = torch.linalg.eigh(factor.T @ (wide_b.T @ wide_b) @ factor)
            values, v = values.flip(0), v.flip(1)
            root = values.sqrt().sqrt()
            m = factor @ v / root
            w = torch.linalg.solve_triangular(factor.T, v * root, upper=True)
            b.copy_(b @ m.float())
            a.copy_(w.T.float() @ a)

    def by_svd(self) -> None:
        """What published code does."""
        for b, a in self.pairs:
            u, s, vh = torch.linalg.svd(b @ a, full_matrices=False)
            root = s[: b.shape[1]].sqrt()
            b.copy_(u[:, : b.shape[1]] * root)
            a.copy_(root[:, None] * vh[: b.shape[1]])


class _Turn:
    """The layer whose turn it is, as it was at first: a balanced pair would be an easier case."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._layers = layers
        self.layer = layers[0]

    def prepare(self, name: str, step: int) -> None:
        self.layer = Layer.__new__(Layer)
        self.layer.pairs = [(b.clone(), a.clone()) for b, a in self._layers[step].pairs]


class _By:
    """One way, as something with steps."""

    def __init__(self, turn: _Turn, way: object) -> None:
        self._turn, self._way = turn, way

    def step(self) -> None:
        self._way(self._turn.layer)  # type: ignore[operator]
