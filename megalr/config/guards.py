"""The JSON's "guards" section."""

from __future__ import annotations

from dataclasses import dataclass

from megalr.schema import require


@dataclass(frozen=True, kw_only=True)
class GuardsConfig:
    """When a run skips updates, and when it stops. It always skips a loss or a gradient that is not finite.

    Attributes:
        max_skipped: maximum consecutive skipped updates; one more stops the run. fp16 skips up to 16 while it looks for
            its loss scale.
        spike_deviations: skip an update whose loss is more than this number of standard deviations above the mean of
            the last losses. None: skip no finite loss.
        window: number of losses in that mean; losses of skipped updates do not count.
        check_replicas_every: updates between two bitwise comparisons of what all ranks should hold alike. 0: never.
    """

    max_skipped: int = 20
    spike_deviations: float | None = None
    window: int = 100
    check_replicas_every: int = 0

    def __post_init__(self) -> None:
        where = "megalr.guards"
        require(self.max_skipped >= 0, f"{where}.max_skipped is {self.max_skipped}; write at least 0")
        require(
            self.spike_deviations is None or self.spike_deviations > 0,
            f"{where}.spike_deviations is {self.spike_deviations}; write a number above 0, or null for no such guard",
        )
        require(self.window >= 2, f"{where}.window is {self.window}; write at least 2")
        require(
            self.check_replicas_every >= 0,
            f"{where}.check_replicas_every is {self.check_replicas_every}; write a number of updates, or 0 for never",
        )
