"""Keep other libraries' chatter off the screen, so that a run's own lines can be read."""

from __future__ import annotations

import logging
import os
import warnings

# Warnings of DeepSpeed that a reader can do nothing about.
_HARMLESS = (
    "Setting accelerator to CPU",
    "ZeRO with an untested optimizer",
    "Attempting to get learning rate from scheduler before it has started",
)


def quieten(*, first: bool) -> None:
    """Show DeepSpeed's, transformers' and datasets' warnings on rank 0, elsewhere their errors alone.

    To be called before DeepSpeed is imported, which logs while it is.

    Args:
        first: whether this is rank 0.
    """
    level = logging.WARNING if first else logging.ERROR
    logging.getLogger("DeepSpeed").addFilter(_Filter(level))
    name = logging.getLevelName(level).lower()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", name)
    os.environ.setdefault("DATASETS_VERBOSITY", name)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' bars follow it
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Deprecations inside libraries are for their authors.
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    if not first:
        warnings.filterwarnings("ignore")


class _Filter(logging.Filter):
    def __init__(self, level: int) -> None:
        super().__init__()
        self._level = level

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < self._level:
            return False
        return record.levelno > logging.WARNING or not any(part in record.getMessage() for part in _HARMLESS)
