"""Bytes that a step at ZeRO stage 3 moves for the optimizer's sake, counted on several CPU processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.ranks import from_ranks
from megalr.formatting import markdown_table

WORLD_SIZE = 4
TIMEOUT = 300.0  # seconds for everything

# By title: the optimizer's section, None for torch's AdamW under DeepSpeed; whether DeepSpeed may reduce-scatter.
SETTINGS: dict[str, tuple[str, bool]] = {
    "AdamW, all-reduce": ("AdamW", False),
    "DeepSpeed Muon, all-reduce": ("DeepSpeed Muon", False),
    "megalr Muon, all-reduce": ("Muon", False),
    "megalr GaLoreAdamW, all-reduce": ("GaLoreAdamW", False),
    "AdamW, reduce-scatter": ("AdamW", True),
    "megalr Muon, reduce-scatter": ("Muon", True),
    "megalr GaLoreAdamW, reduce-scatter": ("GaLoreAdamW", True),
}
COLUMNS = ("optimizer, gradients by", "bytes a step", "the optimizer's own", "of the busiest rank", "/ DeepSpeed Muon")
REFERENCE = "DeepSpeed Muon, all-reduce"


def measure(world_size: int = WORLD_SIZE, timeout: float = TIMEOUT) -> dict[str, list[dict[str, Any]]]:
    """Train with each of :data:`SETTINGS` on fresh processes.

    Args:
        world_size: how many.
        timeout: seconds after which they are killed.

    Returns:
        By title, what each rank counted; see :func:`benchmarks.traffic_rank.count`.

    Raises:
        UserError: a process failed or took too long.
    """
    ranks = from_ranks("benchmarks.traffic_rank", world_size, timeout)
    return {title: [rank[title] for rank in ranks] for title in SETTINGS}


def report(counted: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """A Markdown table: bytes that a rank sends in the last step, on average and at most."""
    own = {title: own_bytes(counted, title) for title in counted}
    world_size = len(next(iter(counted.values())))
    reference = _mean(own[REFERENCE])
    lines = []
    for title, ranks in counted.items():
        cells = [title, f"{_mean([rank['steps'][-1] for rank in ranks]):,.0f}"]
        if not title.startswith("AdamW"):
            cells += [f"{_mean(own[title]):,.0f}", f"{max(own[title]):,.0f}", f"{_mean(own[title]) / reference:.2f}"]
        lines.append(cells)
    head = f"ZeRO stage 3, {world_size} processes, a LLaMA of 4 layers of hidden 64, fp32: bytes that a rank sends\n\n"
    note = "\n\nDeepSpeed refuses its Muon together with reduce-scatter."
    return head + markdown_table(COLUMNS, lines) + note


def own_bytes(counted: Mapping[str, Sequence[Mapping[str, Any]]], title: str) -> list[float]:
    """What each rank sends in the last step beyond what it sends in one of AdamW's, under the same engine."""
    plain = counted[f"AdamW,{title.partition(',')[2]}"]
    return [rank["steps"][-1] - base["steps"][-1] for rank, base in zip(counted[title], plain, strict=True)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
