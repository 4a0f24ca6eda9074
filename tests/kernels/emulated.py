"""The CUDA kernels, compiled for this machine's processor under csrc/emulation, and called through ctypes.

No torch in the library: tensors go in as addresses.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from tests.processes import LIMIT, run

CSRC = Path(__file__).parents[2] / "csrc"
# Less than on a GPU, so that small tensors have several chunks and fill several tables. A table has room for fewer
# tensors (about 70) than blocks.
CHUNK, BLOCKS = 4096, 100
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
FLAGS += [f"-DMEGALR_CHUNK={CHUNK}", f"-DMEGALR_BLOCKS={BLOCKS}"]


class Schedule(ctypes.Structure):
    """The order in which the threads of a block run between two barriers, and blocks after each other."""

    _fields_ = (("order", ctypes.c_int), ("seed", ctypes.c_uint))


SCHEDULES = {"forward": (0, 0), "reverse": (1, 0), "random": (2, 1), "random again": (2, 2)}


class List(ctypes.Structure):
    _fields_ = (("tensors", ctypes.POINTER(ctypes.c_void_p)), ("type", ctypes.c_int))


class AdamW(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_double) for name in ("lr", "beta1", "beta2", "eps", "weight_decay"))


class StableSpam(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_double) for name in ("gamma1", "gamma2", "theta", "norm_eps"))


class Runs(NamedTuple):
    """Lists of tensors of equal lengths: weights, gradients, first and second moments."""

    weights: list[torch.Tensor]
    grads: list[torch.Tensor]
    exp_avgs: list[torch.Tensor]
    exp_avg_sqs: list[torch.Tensor]

    def clone(self) -> Runs:
        return Runs(*([like(t) for t in tensors] for tensors in self))


def like(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with the same alignment."""
    offset = tensor.storage_offset()
    return torch.empty(offset + tensor.numel(), dtype=tensor.dtype)[offset:].copy_(tensor)


def sources() -> list[Path]:
    return [*sorted((CSRC / "cuda").glob("*.cu")), CSRC / "emulation/exports.cpp", CSRC / "emulation/wrong_kernels.cpp"]


def compile_all(
    folder: Path, sources: Sequence[Path], output: str, flags: Sequence[str] = (), link: Sequence[str] = ()
):
    """g++ on each source, two at a time, and the link; returns the path of ``output``."""

    def gcc(*words: object) -> None:
        run(["g++", *map(str, words)], limit=5 * LIMIT)

    def compile_one(source: Path) -> Path:
        result = folder / f"{source.stem}.o"
        gcc("-x", "c++", *FLAGS, *flags, "-c", source, "-o", result)
        return result

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    gcc(*flags, *objects, *link, "-o", folder / output)
    return folder / output


class Emulated:
    """The launchers of csrc/cuda/kernels.h, in one schedule; what the emulation finds is a RuntimeError."""

    def __init__(self, library: ctypes.CDLL, schedule: tuple[int, int]) -> None:
        self.library, self.schedule = library, Schedule(*schedule)

    def momentum_reset(self, tensors: list[torch.Tensor]) -> None:
        self._call("momentum_reset", len(tensors), _pointers(tensors), _int64([t.nbytes for t in tensors]))

    def low_rank_adam(self, runs: Runs, steps: list[int], adam: AdamW, *, reset: bool = False) -> None:
        lists = map(_list, runs)
        self._call("low_rank_adam", *_sizes(runs), *lists, _int64(steps), ctypes.byref(adam), ctypes.c_bool(reset))

    def projected_adam(self, runs: Runs, steps: list[int], adam: AdamW, scale: float) -> list[torch.Tensor]:
        directions = [torch.full(g.shape, torch.nan) for g in runs.grads]
        lists = map(_list, runs[1:])
        tail = (_pointers(directions), _int64(steps), ctypes.byref(adam), ctypes.c_double(scale))
        self._call("projected_adam", *_sizes(runs), *lists, *tail)
        return directions

    def stable_spam_adam(
        self,
        runs: Runs,
        statistics: torch.Tensor,
        clip_steps: list[int],
        biases: tuple[list[float], list[float]],
        adam: AdamW,
        spam: StableSpam,
    ) -> None:
        numbers = (_int64(clip_steps), *map(_double, biases), ctypes.byref(adam), ctypes.byref(spam))
        at = ctypes.c_void_p(statistics.data_ptr())
        self._call("stable_spam_adam", *_sizes(runs), *map(_list, runs), at, *numbers)

    def wrong_kernel(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """One block with a thread for each value."""
        out = torch.zeros_like(values)
        pointers = (ctypes.c_void_p(values.data_ptr()), ctypes.c_void_p(out.data_ptr()))
        function = self.library.emulated_wrong_kernel
        function.restype = ctypes.c_char_p
        error = function(self.schedule.order, self.schedule.seed, name.encode(), values.numel(), *pointers)
        if error:
            raise RuntimeError(error.decode())
        return out

    def _call(self, name: str, *arguments: object) -> None:
        function = getattr(self.library, f"emulated_{name}")
        function.restype = ctypes.c_char_p
        error = function(self.schedule, *arguments)
        if error:
            raise RuntimeError(error.decode())


def _pointers(tensors: Sequence[torch.Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in tensors))


def _list(tensors: Sequence[torch.Tensor]) -> List:
    bfloat16 = bool(tensors) and tensors[0].dtype == torch.bfloat16
    return List(ctypes.cast(_pointers(tensors), ctypes.POINTER(ctypes.c_void_p)), int(bfloat16))


def _int64(values: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(values))(*values)


def _double(values: Sequence[float]) -> ctypes.Array[ctypes.c_double]:
    return (ctypes.c_double * len(values))(*values)


def _sizes(runs: Runs) -> tuple[int, ctypes.Array[ctypes.c_int64]]:
    return len(runs.grads), _int64([g.numel() for g in runs.grads])
