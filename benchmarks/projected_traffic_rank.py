"""One process of :mod:`benchmarks.projected_traffic`: python -m ... FOLDER LAYERS METHOD..."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import megalr
from benchmarks.accounting import SentBytes
from benchmarks.projected_counts import STAGE
from benchmarks.projected_methods import configuration
from benchmarks.projected_traffic import LENGTH, small_shape
from benchmarks.traffic_rank import RANK, join
from megalr.train.models import build_model


def main(folder: Path, layers: int, methods: Sequence[str]) -> None:
    """Count with each method, and write what was counted."""
    rank = join(folder)
    counted = {method: count(method, layers, rank) for method in methods}
    (folder / f"{rank}.json").write_text(json.dumps(counted), encoding="utf-8")
    torch.distributed.barrier()


def count(method: str, layers: int, rank: int) -> list[float]:
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
    generator = torch.Generator().manual_seed(rank)
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
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
