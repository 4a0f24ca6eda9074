"""TensorBoard, CSV files and the like, which report on a training and must not end it."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from megalr.hosts.deepspeed import ENGINE

logger = logging.getLogger(__name__)

MONITORS = "deepspeed.monitor.monitor.MonitorMaster"

# What this file reads and writes of DeepSpeed; held by tests/deepspeed/test_contract.py.
INTERNALS = {ENGINE: ("monitor",), MONITORS: ("write_events",)}


def outlive_monitors(engine: Any) -> None:
    """Have a monitor that cannot write, on a full disk or without a network, be a line in the log.

    Each is asked again with the next numbers. What it has missed is missing there alone.

    Args:
        engine: of DeepSpeed, just made.
    """
    for monitor in vars(engine.monitor).values():
        if hasattr(monitor, "write_events"):
            monitor.write_events = _surviving(monitor.write_events, type(monitor).__name__)


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
