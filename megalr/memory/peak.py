"""The peak memory of this process, as measured."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch


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
