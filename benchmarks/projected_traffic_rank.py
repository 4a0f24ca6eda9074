"""One process of :mod:`benchmarks.projected_traffic`: python -m MODULE FOLDER LAYERS METHOD..."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import megalr
from benchmarks.accounting import SentBytes
from benchmarks.projected_counts import STAGE
from benchmarks.projected_methods import configuration
from benchmarks.projected_traffic import LENGTH, small_shape
from benchmarks.ranks import measure_as_rank
from benchmarks.traffic_rank import RANK
from megalr.train.models import build_model


def count_all(layers: int, methods: Sequence[str]) -> dict[str, list[float]]:
    """:func:`count` with each method."""
    return {method: count(method, layers) for method in methods}


def count(method: str, layers: int) -> list[float]:
    """Train two gaps; the bytes that this rank sent in each step."""
    config, gap = small_shape(layers)
    engine: Any = megalr.initialize(
        model=build_model(config, seed=0),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "steps_per_print": 10**9,
            "zero_optimization": {"stage": STAGE},
            **configuration(method, RANK, gap),
        },
    )[0]
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    steps = []
    for _ in range(2 * gap):
        ids = torch.randint(0, config.vocab_size, (1, LENGTH), generator=generator)
        with SentBytes() as sent:
            engine.backward(engine(input_ids=ids, labels=ids).loss)
            engine.step()
        steps.append(sent.total)
    engine.destroy()
    return steps


if __name__ == "__main__":
    measure_as_rank(Path(sys.argv[1]), partial(count_all, int(sys.argv[2]), sys.argv[3:]))
