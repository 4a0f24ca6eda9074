"""Step times of several optimizers, taken in turns, and what is said of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


class Steps(Protocol):
    """What can be timed; torch's optimizers are."""

    def step(self) -> object:
        """One update."""


@dataclass(frozen=True)
class Summary:
    """Of one optimizer's step times, in seconds; the first step counts like any other."""

    median: float
    p99: float
    max: float
    mean: float
    first: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Summary:
        """Of step times in the order in which they were taken; percentiles interpolate linearly."""
        median, p99 = np.percentile(seconds, [50, 99])
        return cls(float(median), float(p99), max(seconds), float(np.mean(seconds)), seconds[0])


def take_turns(
    contenders: Mapping[str, Steps], steps: int, prepare: Callable[[str, int], None]
) -> dict[str, list[float]]:
    """Time every contender's every step.

    All make their first step, then all their second, and so on, so that noise of the machine hits all alike. Each
    round begins with another one, so that nobody always finds the caches as the same neighbour left them.

    Args:
        contenders: by name.
        steps: of each.
        prepare: called with the name and the step's index before each step, outside the timed part.

    Returns:
        Seconds of each step, by name.
    """
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for step in range(steps):
        turn = step % len(names)
        for name in names[turn:] + names[:turn]:
            prepare(name, step)
            begin = time.perf_counter()
            contenders[name].step()
            seconds[name].append(time.perf_counter() - begin)
    return seconds
