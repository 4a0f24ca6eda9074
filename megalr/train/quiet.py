"""Keep other libraries' chatter off the screen, so that a run's own lines can be read."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Collection

from tqdm import tqdm

# Warnings of DeepSpeed that a reader can do nothing about.
_HARMLESS = (
    "Setting accelerator to CPU",
    "ZeRO with an untested optimizer",
    "Attempting to get learning rate from scheduler before it has started",
)
_SHORTEST = 6  # characters of a key of a service, at least


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


def show_builds() -> None:
    """Show that ops are compiled, which takes a minute, to who has not set up logging. For rank 0."""
    if not logging.getLogger().handlers:
        builds = logging.getLogger("megalr.ops.build")
        builds.setLevel(logging.INFO)
        if not builds.handlers:
            builds.addHandler(_AboveBars())


def hide(secrets: Collection[str]) -> None:
    """Keep keys and passwords of the JSON out of DeepSpeed's log, which has all of the JSON where it says all.

    Args:
        secrets: as :func:`megalr.config.secrets.secrets_in` finds them.
    """
    if secrets:
        logging.getLogger("DeepSpeed").addFilter(_Hiding(secrets))


class _AboveBars(logging.Handler):
    """Prints on standard error, where a progress bar may be."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError, ValueError):  # a closed pipe
            tqdm.write(self.format(record), file=sys.stderr)


class _Hiding(logging.Filter):
    def __init__(self, secrets: Collection[str]) -> None:
        super().__init__()
        # A shorter one is part of many a word, which would give it away.
        self._secrets = sorted((each for each in secrets if len(each) >= _SHORTEST), key=len, reverse=True)

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        for secret in self._secrets:
            message = message.replace(secret, "***")
        record.msg, record.args = message, ()
        return True


class _Filter(logging.Filter):
    def __init__(self, level: int) -> None:
        super().__init__()
        self._level = level

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < self._level:
            return False
        return record.levelno > logging.WARNING or not any(part in record.getMessage() for part in _HARMLESS)
