"""How fast a run is, and what it takes: times, rates and memory, for the rows of ``metrics.jsonl``."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from megalr.memory.peak import memory_bytes, peak_memory_bytes
from megalr.timing import Stopwatch

TERA = 1e12
PARTS = ("forward", "backward", "optimizer", "exchange")


@dataclass(frozen=True, kw_only=True)
class Work:
    """What an update asks of the devices.

    Attributes:
        flops: model FLOPs of one update over all ranks, see :mod:`megalr.train.flops`; None if unknown.
        peak_tflops: of one device, see :mod:`megalr.train.peaks`; None if unknown.
        ranks: how many devices share it.
    """

    flops: int | None
    peak_tflops: float | None
    ranks: int

    def tflops_per_rank(self, updates: int, seconds: float) -> float | None:
        """Model TFLOP/s of one rank that makes so many updates in so many seconds; None if unknown."""
        if self.flops is None or not seconds:
            return None
        return self.flops * updates / seconds / self.ranks / TERA

    def mfu(self, updates: int, seconds: float) -> float | None:
        """The same as a share of the peak, 0 to 1; None if one of the two is unknown."""
        speed = self.tflops_per_rank(updates, seconds)
        return None if speed is None or not self.peak_tflops else speed / self.peak_tflops


class Meter:
    """Times updates.

    An update's time is the process's. It ends with the loss on the CPU, so that a GPU has finished by then, and the
    times of its parts can be read without waiting for it.

    Attributes:
        work: of an update.
        stopwatch: measures the parts of an update, by the names in ``PARTS``.
        updates, tokens, seconds: since the start of the process; tokens of all ranks.
    """

    def __init__(self, work: Work, device: torch.device) -> None:
        """
        Args:
            work: of an update.
            device: where the model computes.
        """
        self.work = work
        self.stopwatch = Stopwatch(device)
        self.updates = self.tokens = 0
        self.seconds = 0.0
        self._parts = dict.fromkeys(PARTS, 0.0)
        self._noted: tuple[int, int, float, dict[str, float]] = (0, 0, 0.0, dict(self._parts))  # at the last row

    @contextmanager
    def update(self) -> Iterator[None]:
        """Time one update, from its batches to its loss."""
        self.stopwatch.clear()  # of what a checkpoint has sent
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start
        self.updates += 1
        for name, seconds in self.stopwatch.take().items():
            self._parts[name] += seconds

    @property
    def tokens_per_second(self) -> float:
        """Of all updates so far in this process, over all ranks."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def row(self) -> dict[str, Any]:
        """Speeds and times since the last call, and memory; see docs/guides/monitoring.md."""
        updates, tokens, before, parts = self._noted
        self._noted = (self.updates, self.tokens, self.seconds, dict(self._parts))
        updates, tokens, seconds = self.updates - updates, self.tokens - tokens, self.seconds - before
        return {
            "tokens_per_second_per_rank": _rounded(tokens / seconds / self.work.ranks if seconds else 0.0),
            "tflops_per_rank": _rounded(self.work.tflops_per_rank(updates, seconds)),
            "mfu": _rounded(self.work.mfu(updates, seconds)),
            "seconds": {
                **{name: _rounded((self._parts[name] - parts[name]) / max(1, updates)) for name in PARTS},
                "total": _rounded(seconds / max(1, updates)),
            },
            "memory_bytes": memory_bytes(),
            "peak_memory_bytes": peak_memory_bytes(),
        }

    def summary(self) -> dict[str, Any]:
        """The same of all updates so far in this process, without memory."""
        return {
            "tokens_per_second_per_rank": self.tokens_per_second / self.work.ranks,
            "flops_per_update": self.work.flops,
            "tflops_per_rank": self.work.tflops_per_rank(self.updates, self.seconds),
            "peak_tflops": self.work.peak_tflops,
            "mfu": self.work.mfu(self.updates, self.seconds),
            "seconds_per_update": {
                name: total / max(1, self.updates) for name, total in (*self._parts.items(), ("total", self.seconds))
            },
        }


def _rounded(number: float | None) -> float | None:
    """Six significant digits, which is more than a clock has."""
    return None if number is None else float(f"{number:.6g}")
