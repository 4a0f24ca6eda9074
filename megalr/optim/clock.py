"""Counting updates: the moments' bias correction, and the learning-rate ramp after a momentum reset."""

from __future__ import annotations

from dataclasses import dataclass

# Where the ramp after a reset starts, as a share of the scheduled learning rate (arXiv 2505.22922's code).
RAMP_START = 0.001


@dataclass
class Clock:
    """The counts of parameters that are always reset together.

    Attributes:
        count: updates since the moments were zero; the bias correction's t before the current update.
        since_reset: updates since the last momentum reset, or None before the first.
    """

    count: int = 0
    since_reset: int | None = None

    def advance(self) -> None:
        """One update has been made."""
        self.count += 1
        if self.since_reset is not None:
            self.since_reset += 1

    def ramp(self, warmup_steps: int) -> float:
        """Factor on the learning rate of the next update.

        1 before any reset. The k-th update after one (k = 1, 2, ...) has 0.001 + 0.999 (k-1) / warmup_steps, at most 1.
        """
        if self.since_reset is None or self.since_reset >= warmup_steps:
            return 1.0
        return RAMP_START + (1 - RAMP_START) * self.since_reset / warmup_steps
