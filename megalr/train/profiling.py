"""``--profile N``: a trace of some updates by torch's profiler, which https://ui.perfetto.dev opens."""

from __future__ import annotations

import contextlib
import gzip
import logging
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

logger = logging.getLogger(__name__)

WARM_UP = 2  # updates: the first allocate memory and compile
NAME = "trace.json.gz"


class Profile:
    """Traces updates of this process, after two to warm up, and writes them in Chrome's format.

    Beside what torch runs, the trace has "forward", "backward", "optimizer" and "exchange", and the events
    "refactorization", "momentum_reset", "refresh", "merge" and "switch". Profiled updates take longer than others.

    To be entered before the first update, and left after the last: a run that ends early has a trace of what was
    recorded.
    """

    def __init__(self, folder: Path, updates: int) -> None:
        """
        Args:
            folder: where to write ``trace.json.gz``; made if there is something to write.
            updates: how many; 0 for none, which costs nothing.
        """
        self._folder, self._updates = folder, updates
        self._profiler: Any = None
        self._is_written = False

    def __enter__(self) -> Profile:
        if self._updates:
            self._profiler = profile(
                activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])],
                schedule=schedule(wait=0, warmup=WARM_UP, active=self._updates, repeat=1),
                on_trace_ready=self._write,
            )
            self._profiler.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._profiler is not None:
            profiler, self._profiler = self._profiler, None
            profiler.__exit__(kind, error, trace)

    def update_is_made(self) -> None:
        """Go on to the next update."""
        if self._profiler is not None:
            self._profiler.step()
        if self._is_written:
            self.__exit__(None, None, None)

    def _write(self, profiler: Any) -> None:
        self._is_written = True
        place = self._folder / NAME
        part = self._folder / f".{NAME}.part"
        plain = self._folder / ".trace.json"
        try:
            self._folder.mkdir(exist_ok=True)
            for old in (part, plain):  # of a killed run; or what others have put there, a link to elsewhere or a pipe
                old.unlink(missing_ok=True)
            profiler.export_chrome_trace(str(plain))
            with plain.open("rb") as source, gzip.open(part, "xb", compresslevel=6) as target:
                shutil.copyfileobj(source, target)
            part.replace(place)
        except OSError as error:
            logger.warning("%s cannot be written: %s. The training goes on without it.", place, error.strerror)
        finally:
            with contextlib.suppress(OSError):
                plain.unlink(missing_ok=True)
