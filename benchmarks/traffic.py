"""Bytes that a step at ZeRO stage 3 moves for the optimizer's sake, counted on several CPU processes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import megalr
from megalr.errors import UserError
from megalr.markdown import table

WORLD_SIZE = 4
TIMEOUT = 300.0  # seconds for everything
SHOWN_CHARACTERS = 4000  # of a failed rank's output

# By title: the optimizer's section, None for torch's AdamW under DeepSpeed; whether DeepSpeed may reduce-scatter.
SETTINGS: dict[str, tuple[str, bool]] = {
    "AdamW, all-reduce": ("AdamW", False),
    "DeepSpeed Muon, all-reduce": ("DeepSpeed Muon", False),
    "megalr Muon, all-reduce": ("Muon", False),
    "megalr GaLoreAdamW, all-reduce": ("GaLoreAdamW", False),
    "AdamW, reduce-scatter": ("AdamW", True),
    "megalr Muon, reduce-scatter": ("Muon", True),
    "megalr GaLoreAdamW, reduce-scatter": ("GaLoreAdamW", True),
}
COLUMNS = ("optimizer, gradients by", "bytes a step", "the optimizer's own", "of the busiest rank", "/ DeepSpeed Muon")
REFERENCE = "DeepSpeed Muon, all-reduce"


def measure(world_size: int = WORLD_SIZE, timeout: float = TIMEOUT) -> dict[str, list[dict[str, Any]]]:
    """Train with each of :data:`SETTINGS` on fresh processes.

    Args:
        world_size: how many.
        timeout: seconds after which they are killed.

    Returns:
        By title, what each rank counted; see :func:`benchmarks.traffic_rank.count`.

    Raises:
        UserError: a process failed or took too long.
    """
    ranks = from_ranks("benchmarks.traffic_rank", world_size, timeout)
    return {title: [rank[title] for rank in ranks] for title in SETTINGS}


def from_ranks(module: str, world_size: int, timeout: float, arguments: Sequence[str] = ()) -> list[Any]:
    """Run a module on fresh processes, and return what each has written to RANK.json in the folder that all are given.

    Args:
        module: run as ``python -m module FOLDER *arguments`` with the environment of a rank.
        world_size: how many.
        timeout: seconds after which they are killed.
        arguments: see above.

    Raises:
        UserError: a process failed or took too long.
    """
    with tempfile.TemporaryDirectory(prefix="traffic-") as name:
        folder = Path(name)
        processes = []
        try:
            for rank in range(world_size):
                processes.append(_start(module, arguments, folder, rank, world_size))
            _wait(processes, folder, timeout)
        finally:
            for process in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        return [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(world_size)]


def report(counted: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """A Markdown table: bytes that a rank sends in the last step, on average and at most."""
    own = {title: own_bytes(counted, title) for title in counted}
    world_size = len(next(iter(counted.values())))
    reference = _mean(own[REFERENCE])
    lines = []
    for title, ranks in counted.items():
        cells = [title, f"{_mean([rank['steps'][-1] for rank in ranks]):,.0f}"]
        if not title.startswith("AdamW"):
            cells += [f"{_mean(own[title]):,.0f}", f"{max(own[title]):,.0f}", f"{_mean(own[title]) / reference:.2f}"]
        lines.append(cells)
    head = f"ZeRO stage 3, {world_size} processes, a LLaMA of 4 layers of hidden 64, fp32: bytes that a rank sends\n\n"
    note = "\n\nDeepSpeed refuses its Muon together with reduce-scatter."
    return head + table(COLUMNS, lines) + note


def own_bytes(counted: Mapping[str, Sequence[Mapping[str, Any]]], title: str) -> list[float]:
    """What each rank sends in the last step beyond what it sends in one of AdamW's, under the same engine."""
    plain = counted[f"AdamW,{title.partition(',')[2]}"]
    return [rank["steps"][-1] - base["steps"][-1] for rank, base in zip(counted[title], plain, strict=True)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def import_path() -> str:
    """A PYTHONPATH by which a child process finds the megalr that this one runs."""
    root = str(Path(megalr.__file__).parents[1])
    return os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])


def _start(module: str, arguments: Sequence[str], folder: Path, rank: int, world_size: int) -> subprocess.Popen[bytes]:
    env = {
        **os.environ,
        "PYTHONPATH": import_path(),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "TORCHDYNAMO_DISABLE": "1",  # DeepSpeed compiles its Muon, which changes no byte
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_SIZE": str(world_size),
        **({"GLOO_SOCKET_IFNAME": "lo"} if Path("/sys/class/net/lo").exists() else {}),
    }
    with open(folder / f"{rank}.log", "wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", module, str(folder), *arguments],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that what it started dies with it
        )


def _wait(processes: Sequence[subprocess.Popen[bytes]], folder: Path, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while any(process.poll() is None for process in processes):
        failed = [rank for rank, process in enumerate(processes) if process.poll()]
        if failed or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    for rank, process in enumerate(processes):
        if process.poll():
            output = (folder / f"{rank}.log").read_text(encoding="utf-8", errors="replace")
            raise UserError(f"process {rank} failed with exit code {process.poll()}:\n{output[-SHOWN_CHARACTERS:]}")
    if any(process.poll() is None for process in processes):
        raise UserError(f"{len(processes)} processes did not finish within {timeout:g} seconds")
