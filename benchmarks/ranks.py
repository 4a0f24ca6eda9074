"""Measure on several CPU processes: start one per rank, and collect what each has found."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megalr.errors import UserError
from megalr.processes import python_path, run_processes

ROOT = Path(__file__).parents[1]  # the folder that holds benchmarks/, which is not installed
SHOWN_CHARACTERS = 4000  # of the output of processes that failed


def from_ranks(module: str, world_size: int, timeout: float, arguments: Sequence[str] = ()) -> list[Any]:
    """Run a module on new processes, and return what each rank has measured, in rank order.

    Args:
        module: run as ``python -m module FOLDER *arguments``; it calls :func:`measure_as_rank`.
        world_size: number of processes.
        timeout: seconds after which they are killed.
        arguments: see above.

    Raises:
        UserError: a process failed or took too long.
    """
    environment = {
        "PYTHONPATH": python_path(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "TORCHDYNAMO_DISABLE": "1",  # DeepSpeed compiles its Muon, which changes no byte
        **({"GLOO_SOCKET_IFNAME": "lo"} if Path("/sys/class/net/lo").exists() else {}),
    }
    with tempfile.TemporaryDirectory(prefix="ranks-") as name:
        folder = Path(name)
        command = {module: ["-m", module, str(folder), *arguments]}
        (ended,) = run_processes(command, folder, ranks=world_size, environment=environment, timeout=timeout)
        if ended.code:
            output = ended.log.read_text(encoding="utf-8", errors="replace")[-SHOWN_CHARACTERS:]
            what = f"did not finish within {timeout:g} seconds" if ended.seconds > timeout else "failed"
            raise UserError(f"{module} on {world_size} processes {what} (exit code {ended.code}):\n{output}")
        return [json.loads(_file_of(folder, rank).read_text(encoding="utf-8")) for rank in range(world_size)]


def measure_as_rank(folder: Path, measure: Callable[[], Any]) -> None:
    """Join the other ranks, measure, and write the result for :func:`from_ranks`.

    Args:
        folder: the one that all ranks were given. They meet through a file in it: nobody can take it, unlike a port.
        measure: what to run; returns something that JSON can hold.
    """
    import deepspeed

    # An op for tensor-parallel inference that DeepSpeed would otherwise compile here, for a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    for name, alone in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1"}.items():
        os.environ.setdefault(name, alone)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    deepspeed.init_distributed(
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world_size,
        auto_mpi_discovery=False,
        verbose=False,
    )
    _file_of(folder, rank).write_text(json.dumps(measure()), encoding="utf-8")
    deepspeed.comm.barrier()


def _file_of(folder: Path, rank: int) -> Path:
    return folder / f"{rank}.json"
