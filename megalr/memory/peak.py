"""The memory of this process, now and at its peak, as measured."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

import torch


def memory_bytes() -> int | None:
    """The memory this process holds now: allocated on the GPU if it uses one, else resident; None if unknown.

    See :func:`peak_memory_bytes`.
    """
    if torch.cuda.is_available() and (allocated := torch.cuda.memory_allocated()):
        return allocated
    pages = Path("/proc/self/statm")
    return int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if pages.exists() else None


def peak_memory_bytes() -> int:
    """The most memory this process has held: allocated on the GPU if it uses one, else resident.

    On a GPU this is what torch allocated, without its cache, the CUDA context and the communication library.
    """
    if torch.cuda.is_available() and (allocated := torch.cuda.max_memory_allocated()):
        return allocated
    # ru_maxrss is inherited: the child of a large process starts from its parent's peak. VmHWM is its own.
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # KiB on Linux, bytes on macOS
