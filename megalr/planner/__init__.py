"""What a run costs before it starts, and what it did once it is over: memory, tables, plots."""

from megalr.planner.memory import (
    ParameterRecord,
    RankBytes,
    buffer_bytes,
    deepspeed_bytes,
    expected_bytes,
    frozen_shapes,
    measured_bytes,
    merged_shapes,
    paper_bytes,
    records,
)
from megalr.planner.report import human_bytes, peak_memory_bytes, plot_losses, summary_table

__all__ = [
    "ParameterRecord",
    "RankBytes",
    "buffer_bytes",
    "deepspeed_bytes",
    "expected_bytes",
    "frozen_shapes",
    "human_bytes",
    "measured_bytes",
    "merged_shapes",
    "paper_bytes",
    "peak_memory_bytes",
    "plot_losses",
    "records",
    "summary_table",
]
