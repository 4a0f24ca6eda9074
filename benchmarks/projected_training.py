"""Whole training steps without DeepSpeed: forward, backward, and megalr's optimizer as an ordinary one of torch's."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from benchmarks.projected_counts import random_tokens
from benchmarks.projected_methods import TITLES, configuration
from benchmarks.ranks import ROOT
from benchmarks.timing import Summary, take_turns
from megalr.api import build_optimizer, parametrize
from megalr.errors import UserError
from megalr.memory.peak import peak_memory_bytes
from megalr.optim.events.projected import Projections
from megalr.processes import python_path
from megalr.train.models import build_model, empty_model, read_model_config

if TYPE_CHECKING:
    from transformers import LlamaConfig

SHOWN_CHARACTERS = 4000  # of a failed process's output
GAP = 50  # the shipped configurations'
PEAK_STEPS = 2  # the optimizer's state exists from the first on, beside the second's activations
# Aims: a median against AdamW's and against the rule's, and the 99th percentile against the median.
AGAINST_ADAMW, AGAINST_RULE, STEADY = 0.95, 0.9, 1.3
TIME_COLUMNS = (
    "method",
    "median s",
    "99th percentile",
    "maximum",
    f"median / AdamW (aim {AGAINST_ADAMW})",
    f"/ rule (aim {AGAINST_RULE})",
    f"99th / median (aim {STEADY})",
)


class Training:
    """A model and its optimizer; each :meth:`step` trains on the next tokens.

    Attributes:
        cpu_seconds: processor time of each step, over all threads.
    """

    def __init__(
        self, config: LlamaConfig, method: str, rank: int, gap: int, next_tokens: Callable[[], Tensor]
    ) -> None:
        """
        Args:
            config: the model's shape.
            method: a key of :data:`benchmarks.projected_methods.TITLES`.
            rank, gap: its r, and updates between refreshes.
            next_tokens: gives (sequences, length) token numbers.
        """
        section = configuration(method, rank, gap)
        self._model = build_model(config, seed=0)
        parametrize(self._model, section)
        self._optimizer = build_optimizer(self._model, section)
        self._next_tokens = next_tokens
        self.cpu_seconds: list[float] = []

    def step(self) -> None:
        """Forward pass, backward pass, update; gradients are freed."""
        begin = time.process_time()
        ids = self._next_tokens()
        self._model(input_ids=ids, labels=ids).loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.cpu_seconds.append(time.process_time() - begin)

    def pass_first_gap(self) -> None:
        """Let projected layers refresh as they do from the second gap on: by a power step from the last basis.

        In the first gap each starts from a random basis and makes a whole randomized decomposition, once in a run.
        """
        for event in self._optimizer.events:
            if isinstance(event, Projections):
                numbers = event.numbers()
                for counts in numbers["bases"].values():
                    counts["refreshes"] = max(1, counts["refreshes"])
                event.load_numbers(numbers)


def time_methods(
    config: LlamaConfig,
    methods: Sequence[str],
    rank: int,
    gap: int,
    *,
    sequences: int,
    length: int,
    steps: int,
    warm_up: int,
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of every step of every method, taken in turns on the same tokens; and its seconds of processor time.

    Args:
        config: the model's shape.
        methods: keys of :data:`benchmarks.projected_methods.TITLES`.
        rank, gap: r, and updates between refreshes.
        sequences, length: tokens of a step.
        steps: timed.
        warm_up: steps before that, which are not: in the first the rule computes all its bases, and all allocate.
    """
    tokens = random_tokens(config, sequences, length)
    trainings = {method: Training(config, method, rank, gap, lambda: tokens) for method in methods}

    def collect(method: str, step: int) -> None:
        """Python's cycles are collected between steps, where they disturb nobody's time, and all alike."""
        gc.collect()
        tokens.copy_(random_tokens(config, sequences, length, seed=step))

    gc.freeze()  # what exists already need not be looked at in every collection
    gc.disable()
    try:
        take_turns(trainings, warm_up, collect)
        for training in trainings.values():
            training.pass_first_gap()
        wall = take_turns(trainings, steps, collect)
    finally:
        gc.enable()
        gc.unfreeze()
    return wall, {method: training.cpu_seconds[warm_up:] for method, training in trainings.items()}


def time_rows(seconds: Mapping[str, Sequence[float]]) -> list[list[str]]:
    """The table's rows: seconds, and ratios to what the aims are set against, "-" where that did not take part."""
    summaries = {method: Summary.of(taken) for method, taken in seconds.items()}
    lines = []
    for method, summary in summaries.items():
        ratios = [
            f"{summary.median / summaries[other].median:.3f}" if other in summaries else "-"
            for other in ("adamw", "galore")
        ]
        times = (summary.median, summary.p99, summary.max)
        lines.append(
            [TITLES[method], *(f"{value:.3f}" for value in times), *ratios, f"{summary.p99 / summary.median:.2f}"]
        )
    return lines


def peak_memory(name: str, models: Path, method: str, sequences: int, length: int, gap: int) -> dict[str, int]:
    """The peak memory of training steps in a fresh process.

    Args:
        name: of the shape, as :func:`megalr.train.models.read_model_config` takes it.
        models: the folder of the named shapes.
        method: a key of :data:`benchmarks.projected_methods.TITLES`; r is a quarter of the hidden size.
        sequences, length: tokens of a step.
        gap: updates between refreshes.

    Returns:
        Bytes: "start" once everything is imported, "peak" after :data:`PEAK_STEPS` steps.

    Raises:
        UserError: the process failed, as when memory does not suffice.
    """
    arguments = [name, str(models), method, *map(str, (sequences, length, gap, torch.get_num_threads()))]
    command = [sys.executable, "-m", "benchmarks.projected_training", *arguments]
    environment = {**os.environ, "PYTHONPATH": python_path(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise UserError(
            f"{TITLES[method]} at {name} failed with exit code {done.returncode}:\n{done.stderr[-SHOWN_CHARACTERS:]}"
        )
    measured: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return measured


def main(name: str, models: str, method: str, *numbers: str) -> None:
    """Train in this process, and print what :func:`peak_memory` returns."""
    sequences, length, gap, threads = map(int, numbers)
    torch.set_num_threads(threads)
    config = read_model_config(name, Path(models))
    tokens = random_tokens(config, sequences, length)
    empty_model(config)  # imports what a model needs
    start = peak_memory_bytes()
    training = Training(config, method, config.hidden_size // 4, gap, lambda: tokens)
    for _ in range(PEAK_STEPS):
        training.step()
    print(json.dumps({"start": start, "peak": peak_memory_bytes()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
