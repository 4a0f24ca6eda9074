"""Momentum reset: moments and their step count become zero, and the learning rate ramps up again (arXiv 2505.22922)."""

from __future__ import annotations

from typing import ClassVar

from megalr.config.settings import MomentumResetConfig
from megalr.optim.events.base import Event


class MomentumReset(Event):
    """Resets every T updates. The update before it stores the zeros; there is nothing left to do afterwards."""

    name: ClassVar[str] = "momentum_reset"

    def __init__(self, config: MomentumResetConfig) -> None:
        """
        Args:
            config: the "momentum_reset" section.
        """
        self.restart_warmup_steps = config.warmup_steps
        self._interval = config.interval
        self._clocks = {"factors", "dense"} if config.scope == "all" else {"factors"}

    def due(self, updates: int) -> bool:
        return updates % self._interval == 0

    def resets_due(self, updates: int) -> set[str]:
        return self._clocks if self.due(updates) else set()

    def restarts_due(self, updates: int) -> set[str]:
        return self.resets_due(updates)

    def end_update(self, updates: int) -> list[int]:
        return []
