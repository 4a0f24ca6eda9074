"""What a refactorization every 200 updates adds to training steps of the 60M shape, on one CPU process."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.projected_counts import random_tokens
from megalr.api import build_optimizer, parametrize
from megalr.formatting import markdown_table
from megalr.train.models import build_model, read_model_config

TITLE = "Refactorization in training steps of the 60M shape, rank 128, 4 x 256 tokens"
INTERVAL = 200  # of the paper
AIM = 0.01
STEPS = 12  # of which every other one refactorizes
WITHOUT, WITH = "step without refactorization", "step with one"


def measure(arguments: argparse.Namespace, models: Path) -> dict[str, list[float]]:
    """Seconds of whole training steps, forward and backward pass included, half of which refactorize."""
    config = read_model_config("60m", models)
    section = {
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
        "megalr": {
            "parametrization": {"type": "low_rank", "rank": 128, "target_modules": ["attn", "mlp"]},
            "refactorization": {"interval": 2, "moments": "reset"},
        },
    }
    model = build_model(config, seed=0)
    parametrize(model, section)
    optimizer = build_optimizer(model, section)
    seconds: dict[str, list[float]] = {WITHOUT: [], WITH: []}
    for step in range(2 + STEPS):
        ids = random_tokens(config, 4, 256, seed=step)
        begin = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        taken = time.perf_counter() - begin
        if step >= 2:  # the first two touch memory for the first time
            seconds[WITH if "refactorization" in optimizer.last_events else WITHOUT].append(taken)
    return seconds


def report(seconds: Mapping[str, Sequence[float]]) -> str:
    """The table."""
    medians = {name: float(np.median(taken)) for name, taken in seconds.items()}
    share = (medians[WITH] - medians[WITHOUT]) / INTERVAL / medians[WITHOUT]
    rows = [[name, f"{median:.3f}", ""] for name, median in medians.items()]
    rows.append([f"one in {INTERVAL} steps, of all their time", "", f"{share:.2%} (aim: below {AIM:.0%})"])
    return markdown_table(("", "median s", "share"), rows)
