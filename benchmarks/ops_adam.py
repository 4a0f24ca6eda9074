"""The element-wise ops on the factors of the 60M shape, beside torch's fused AdamW and their torch references."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.optim.adamw import adamw

from benchmarks.timing import take_turns
from megalr.formatting import markdown_table
from megalr.ops import low_rank_adam, projected_adam, stable_spam_adam
from megalr.ops.reference import projected_adam_reference, stable_spam_adam_reference
from megalr.train.models import read_model_config

TITLE = "Element-wise ops on the factors of the 60M shape, rank 128, fp32"
RANK = 128
WARM_UP = 3
BETAS, EPS = (0.9, 0.999), 1e-8
FUSED, OP, RESET = "torch's fused AdamW", "megalr::low_rank_adam", "megalr::low_rank_adam, reset due"
PROJECTED, PROJECTED_TORCH = "megalr::projected_adam", "projected_adam by torch"
SPAM, SPAM_TORCH = "megalr::stable_spam_adam", "stable_spam_adam by torch"
# Beside what each is held to, and how many times as fast it should be.
HELD_TO = {OP: (FUSED, 1.0), RESET: (FUSED, 0.95), PROJECTED: (PROJECTED_TORCH, 1.5), SPAM: (SPAM_TORCH, 1.5)}


def measure(arguments: argparse.Namespace, models: Path) -> dict[str, list[float]]:
    """Seconds of every step of each way, in turns; the first steps, in which memory is touched, are left out."""
    config = read_model_config("60m", models)
    factors = Factors.of(config.hidden_size, config.intermediate_size, config.num_hidden_layers)
    ways = {name: _Steps(way, factors) for name, way in WAYS.items()}
    take_turns(ways, WARM_UP, lambda name, step: None)
    return take_turns(ways, arguments.steps, lambda name, step: None)


def report(seconds: Mapping[str, Sequence[float]]) -> str:
    """The table."""
    medians = {name: float(np.median(taken)) for name, taken in seconds.items()}
    rows = []
    for name, median in medians.items():
        other, aim = HELD_TO.get(name, ("", 0.0))
        against = [f"{medians[other] / median:.2f}", f"{aim:g}", other] if other else ["", "", ""]
        rows.append([name, f"{median * 1e3:.2f}", f"{np.percentile(seconds[name], 99) * 1e3:.2f}", *against])
    return markdown_table(("way", "median ms", "99th percentile", "times as fast", "aim, at least", "as"), rows)


@dataclass(frozen=True)
class Factors:
    """Random factors with their gradients and moments; lists of one length."""

    weights: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    statistics: Tensor

    @classmethod
    def of(cls, hidden: int, intermediate: int, layers: int) -> Factors:
        """Of all layers of a LLaMA."""
        random = torch.Generator().manual_seed(0)
        sides = [hidden, hidden] * 4 + [intermediate, hidden] * 3  # of the seven pairs of a layer
        shapes = [(side, RANK) for side in sides * layers]
        weights, grads = ([torch.randn(shape, generator=random) for shape in shapes] for _ in range(2))
        first, second = ([torch.rand(shape, generator=random) for shape in shapes] for _ in range(2))
        return cls(weights, grads, first, second, torch.ones(len(shapes), 3))


class _Steps:
    """One way, on data that all ways share: each overwrites it, and none looks at the values."""

    def __init__(self, way: Callable[[Factors, int], object], factors: Factors) -> None:
        self._way, self._factors, self._step = way, factors, 0

    def step(self) -> None:
        self._step += 1
        self._way(self._factors, self._step)


def _fused(f: Factors, step: int) -> None:
    counts = [torch.full((), step - 1.0) for _ in f.weights]
    adamw(
        f.weights,
        f.grads,
        f.exp_avgs,
        f.exp_avg_sqs,
        [],
        counts,
        fused=True,
        amsgrad=False,
        beta1=BETAS[0],
        beta2=BETAS[1],
        lr=1e-3,
        weight_decay=0.0,
        eps=EPS,
        maximize=False,
    )


def _op(f: Factors, step: int, reset: bool = False) -> None:
    lists = (f.weights, f.grads, f.exp_avgs, f.exp_avg_sqs)
    low_rank_adam(*lists, steps=[step] * len(f.grads), lr=1e-3, betas=BETAS, eps=EPS, weight_decay=0.0, reset=reset)


def _projected(f: Factors, step: int) -> None:
    projected_adam(f.grads, f.exp_avgs, f.exp_avg_sqs, steps=[step] * len(f.grads), betas=BETAS, eps=EPS)


def _projected_by_torch(f: Factors, step: int) -> None:
    directions = [torch.empty_like(grad) for grad in f.grads]
    projected_adam_reference(directions, f.grads, f.exp_avgs, f.exp_avg_sqs, [step] * len(f.grads), *BETAS, EPS, 1.0)


def _spam(f: Factors, step: int) -> None:
    count, bias1, bias2 = len(f.grads), 1 - BETAS[0] ** step, 1 - BETAS[1] ** step
    stable_spam_adam(
        f.weights,
        f.grads,
        f.exp_avgs,
        f.exp_avg_sqs,
        f.statistics,
        clip_steps=[step] * count,
        bias1=[bias1] * count,
        bias2=[bias2] * count,
        lr=1e-3,
        betas=BETAS,
        eps=EPS,
        weight_decay=0.0,
        gammas=(0.85, 0.999),
        theta=0.999,
        norm_eps=EPS,
    )


def _spam_by_torch(f: Factors, step: int) -> None:
    count, bias1, bias2 = len(f.grads), 1 - BETAS[0] ** step, 1 - BETAS[1] ** step
    lists = (f.weights, f.grads, f.exp_avgs, f.exp_avg_sqs)
    steps = ([step] * count, [bias1] * count, [bias2] * count)
    stable_spam_adam_reference(*lists, f.statistics, *steps, 1e-3, *BETAS, EPS, 0.0, 0.85, 0.999, 0.999, EPS)


WAYS: dict[str, Callable[[Factors, int], object]] = {
    FUSED: _fused,
    OP: _op,
    RESET: lambda f, step: _op(f, step, reset=True),
    PROJECTED: _projected,
    PROJECTED_TORCH: _projected_by_torch,
    SPAM: _spam,
    SPAM_TORCH: _spam_by_torch,
}
