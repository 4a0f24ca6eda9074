"""Holds the formula for the bytes that a rank sends against what CPU processes have sent while they trained."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from benchmarks.projected_counts import Groups, groups_of, sent_by_formula
from benchmarks.projected_methods import COUNTED, TITLES
from benchmarks.ranks import from_ranks
from benchmarks.traffic import WORLD_SIZE

if TYPE_CHECKING:
    from transformers import LlamaConfig

LAYERS = 3  # of seven matrices each, which four ranks cannot share without cutting some
MATRICES = 7  # of a layer
SPARE = 3  # updates of a gap in which nothing is refreshed
LENGTH = 64  # tokens of a sequence: more than the rank, so that gradients have the rank that a basis needs
TIMEOUT = 600.0  # seconds for everything


class FormulaError(Exception):
    """The formula does not give what was counted: DeepSpeed, or megalr, communicates otherwise than it says."""


def small_shape(layers: int) -> tuple[LlamaConfig, int]:
    """A small LLaMA, and a gap in which each of its bases is refreshed once and some updates refresh none."""
    from transformers import LlamaConfig

    from benchmarks.traffic_rank import SHAPE

    return LlamaConfig(**{**SHAPE, "num_hidden_layers": layers}), MATRICES * layers + SPARE


def measure(
    methods: Sequence[str] = COUNTED, world_size: int = WORLD_SIZE, layers: int = LAYERS
) -> dict[str, list[list[float]]]:
    """By method, for each rank the bytes that it sent in every step of two gaps."""
    arguments = [str(layers), *methods]
    ranks = from_ranks("benchmarks.projected_traffic_rank", world_size, TIMEOUT, arguments)
    return {method: [rank[method] for rank in ranks] for method in methods}


def check(counted: Mapping[str, Sequence[Sequence[float]]], layers: int = LAYERS) -> str:
    """Compare what was counted with the formula, for every method and rank; a sentence that says so.

    A step without a refresh has to agree by itself, and so does the whole second gap. In the first gap bases that are
    random become the gradient's, which costs more.

    Raises:
        FormulaError: something does not agree.
    """
    from benchmarks.traffic_rank import RANK

    config, gap = small_shape(layers)
    cut = 0
    for method, ranks in counted.items():
        groups = groups_of(config, method, RANK)
        quiet = _without_refresh(groups, gap)
        for rank, steps in enumerate(ranks):
            expected = sent_by_formula(groups, len(ranks), rank, gap)
            cut += expected.moved > 0
            where = f"{TITLES[method]}, rank {rank}"
            for step in quiet:
                _compare(f"{where}, step {step}", steps[gap + step], expected.ordinary)
            _compare(f"{where}, the second gap", sum(steps[gap:]), gap * expected.total)
    world_size = len(next(iter(counted.values())))
    also = "; matrices that are cut have travelled, too" if cut else ""
    return (
        f"The formula for bytes sent agrees with what {world_size} processes have sent while they trained a LLaMA of "
        f"{layers} layers of hidden {config.hidden_size} at r = {RANK}: byte for byte in every step without a refresh, "
        f"and in the sum over a gap of {gap} updates in which every basis is refreshed once, on every rank{also}."
    )


def _without_refresh(groups: Groups, gap: int) -> list[int]:
    """Updates of a gap, counted inside it, in which no basis is refreshed: all of them where there is none."""
    phases = {index * gap // len(groups.bases) for index in range(len(groups.bases))}
    return [step for step in range(gap) if step not in phases]


def _compare(where: str, counted: float, expected: float) -> None:
    # Both are sums of whole numbers and quarters, which floats hold exactly up to the order of additions.
    if not math.isclose(counted, expected, rel_tol=1e-12, abs_tol=1e-6):
        raise FormulaError(f"{where}: {counted:,.2f} bytes were counted, the formula gives {expected:,.2f}")
