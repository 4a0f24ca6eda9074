"""How long named spans take, and their names in a trace of torch's profiler."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def span(name: str, *, shown: bool = True) -> Iterator[None]:
    """A block that a profiler's trace shows under a name; without a profiler it costs a microsecond.

    Args:
        name: what the trace calls it.
        shown: whether there is anything to show.
    """
    if not shown or not torch.autograd.profiler._is_profiler_enabled:
        yield
        return
    with torch.autograd.profiler.record_function(name):
        yield


class Stopwatch:
    """Adds up the time of named spans.

    On a CPU a span is measured by the process's clock. On a GPU it is measured by two events on the current stream, so
    that nothing waits: :meth:`take` reads them, and has to be called when the device has finished the work.
    """

    def __init__(self, device: torch.device) -> None:
        """
        Args:
            device: where the work is done.
        """
        self._on_gpu = device.type == "cuda"
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Time a block, and show it as a :func:`span`."""
        if self._on_gpu:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            with span(name):
                yield
            end.record()
            self._events.append((name, start, end))
            return
        begin = time.perf_counter()
        with span(name):
            yield
        self._seconds[name] += time.perf_counter() - begin

    def clear(self) -> None:
        """Forget what was measured."""
        self._events.clear()
        self._seconds.clear()

    def take(self) -> dict[str, float]:
        """Seconds of each span since the last call. On a GPU the device must have finished all of them."""
        for name, start, end in self._events:
            self._seconds[name] += start.elapsed_time(end) / 1000  # milliseconds
        found = dict(self._seconds)
        self.clear()
        return found
