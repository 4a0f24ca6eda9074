"""TensorBoard, CSV files and the like, which report on a training and must not end it."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Collection
from typing import Any

from megalr.hosts.deepspeed import ENGINE, UNFILTERED

logger = logging.getLogger(__name__)

MONITORS = "deepspeed.monitor.monitor.MonitorMaster"
CSV = "deepspeed.monitor.csv_monitor.csvMonitor"
TENSORBOARD = "deepspeed.monitor.tensorboard.TensorBoardMonitor"

# What this file reads and writes of DeepSpeed; held by tests/deepspeed/test_contract.py.
INTERNALS = {
    ENGINE: ("monitor",),
    MONITORS: ("write_events", "csv_monitor", "tb_monitor"),
    CSV: ("filenames", "log_dir"),
    TENSORBOARD: ("summary_writer",),
}


def outlive_monitors(engine: Any) -> None:
    """Have a monitor that cannot write, on a full disk or without a network, be a line in the log.

    Each is asked again with the next numbers. What it has missed is missing there alone.

    Args:
        engine: of DeepSpeed, just made.
    """
    for monitor in vars(engine.monitor).values():
        if hasattr(monitor, "write_events"):
            monitor.write_events = _surviving(monitor.write_events, type(monitor).__name__)


def leave_out(monitors: Any, names: Collection[str]) -> None:
    """Have numbers of these names reach monitors from the engine's host alone, and none from the engine itself.

    Args:
        monitors: of an engine.
        names: as DeepSpeed calls them.
    """
    write = monitors.write_events

    @functools.wraps(write)
    def write_events(events: Any) -> None:
        kept = [event for event in events if event[0] not in names]
        if kept:
            write(kept)

    setattr(monitors, UNFILTERED, write)
    monitors.write_events = write_events


def go_on(monitors: Any, sequences: int, headed: Callable[[str, int], Collection[str]]) -> None:
    """Have files of a run that goes on be those of one that was never interrupted; TensorBoard hides what lies beyond.

    Args:
        monitors: of an engine; on other ranks than the first they have none.
        sequences: how many have been read; the x axis of all monitors.
        headed: called with the folder of CSV files and ``sequences``; names of files that need no header.
    """
    files = getattr(monitors, "csv_monitor", None)
    if files is not None:
        files.filenames.extend(headed(files.log_dir, sequences))
    board = getattr(monitors, "tb_monitor", None)
    if board is not None and board.summary_writer is not None:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415  (it is there where the monitor is)

        board.summary_writer.close()
        board.summary_writer = SummaryWriter(log_dir=board.summary_writer.log_dir, purge_step=sequences + 1)


def _surviving(write: Callable[..., None], name: str) -> Callable[..., None]:
    has_failed = False

    @functools.wraps(write)
    def write_events(*args: Any, **kwargs: Any) -> None:
        nonlocal has_failed
        try:
            write(*args, **kwargs)
        except Exception as error:  # each has kinds of its own
            if not has_failed:
                logger.warning("%s cannot write: %s. The training goes on, and numbers are missing there.", name, error)
            has_failed = True

    return write_events
