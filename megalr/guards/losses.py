"""Losses of the last updates, and whether a further one stands out."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

LEAST = 20  # losses to have a standard deviation that means something
ROUNDING = 1e-6  # of the mean: losses that were equal but for it have no deviation to measure by


class LossWindow:
    """The last accepted losses.

    Args:
        size: how many are kept.
        deviations: how many standard deviations above their mean a loss may be; None lets every one pass.
    """

    def __init__(self, size: int, deviations: float | None) -> None:
        self._deviations = deviations
        self._losses: deque[float] = deque(maxlen=size)

    def accept(self, loss: float) -> None:
        """Take in the loss of an update that was made."""
        self._losses.append(loss)

    def objection(self, loss: float) -> str | None:
        """In words, how a finite loss stands out; None where it does not, or where too few are known to tell."""
        known = len(self._losses)
        if self._deviations is None or known < min(LEAST, self._losses.maxlen or LEAST):
            return None
        # The same on all ranks and after a resume: sums that are rounded once depend on no order.
        mean = math.fsum(self._losses) / known
        deviation = math.sqrt(math.fsum((each - mean) ** 2 for each in self._losses) / (known - 1))
        deviation = max(deviation, ROUNDING * abs(mean), math.ulp(0.0))
        if loss <= mean + self._deviations * deviation:
            return None
        above = (loss - mean) / deviation
        return f"loss {loss:.4g} is {above:.1f} deviations above the mean {mean:.4g} of the last {known}"

    def state(self) -> list[float]:
        """The losses, oldest first."""
        return list(self._losses)

    def load(self, losses: Iterable[float]) -> None:
        """Take what :meth:`state` returned, the last of it where the window is smaller now."""
        self._losses.clear()
        self._losses.extend(losses)
