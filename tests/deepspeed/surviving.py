"""What the ranks do in the tests of engines that are killed in a save, and of checkpoints that are damaged."""

from __future__ import annotations

import hashlib
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import megalr
from megalr.checkpoint.manifest import MANIFEST
from tests.deepspeed import rule_training
from tests.deepspeed.checkpointing import _all, engine_of
from tests.deepspeed.crashing import Deaths
from tests.deepspeed.tensor_training import tensor_parallel_groups
from tests.deepspeed.training import run_steps, same

FIRST, SECOND = "rank-00000.safetensors", "rank-00001.safetensors"


def die_saving(
    method: str, stage: int, folder: str, updates: int, who: int, point: str, everyone: bool, **how: Any
) -> None:
    """Train and save after each update, until a process is killed in the last save, or all are."""
    with tensor_parallel_groups():
        engine = engine_of(method, 1, stage)
        processes: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(processes, os.getpid())
        others = [each for each in processes if each != os.getpid()] if everyone else []
        deaths = Deaths(Path(folder), point, others)
        for update, batch in enumerate(rule_training.batches(updates), start=1):
            run_steps(engine, [batch])
            _record(folder, update).write_text(_digest(engine))
            if update == updates and dist.get_rank() == who:
                megalr.wait_for_checkpoint()
                deaths.count()
            megalr.save_checkpoint(engine, folder, **how)
        megalr.wait_for_checkpoint()


def survive(method: str, stage: int, folder: str) -> tuple[int, bool, list[str]]:
    """Load and save again; how many updates there were, whether all is as it was then, and what was passed over."""
    with tensor_parallel_groups():
        engine = engine_of(method, 1, stage)
        loaded = megalr.load_checkpoint(engine, folder)
        alike = _record(folder, loaded.updates).read_text() == _digest(engine)
        run_steps(engine, rule_training.batches(1))
        megalr.save_checkpoint(engine, folder, keep=1)
        engine.destroy()
    return loaded.updates, alike, loaded.skipped


def _record(folder: str, update: int) -> Path:
    return Path(f"{folder}.{update}.{dist.get_rank()}")


def _digest(engine: Any) -> str:
    """Of everything that this process has, to the bit."""
    total = hashlib.sha256()
    for key, value in sorted(_all(engine).items()):
        if key != "random":  # which is drawn anew
            total.update(key.encode())
            is_tensor = isinstance(value, torch.Tensor)
            total.update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if is_tensor else b"")
            total.update(repr((value.shape, value.dtype) if is_tensor else value).encode())
    return total.hexdigest()


def _flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def _exchange(step: Path) -> None:
    (step / FIRST).rename(step / "aside")
    (step / SECOND).rename(step / FIRST)
    (step / "aside").rename(step / SECOND)


# What is done to the newest checkpoint.
DAMAGES: dict[str, Callable[[Path], Any]] = {
    "cut short": lambda step: os.truncate(step / SECOND, (step / SECOND).stat().st_size // 2),
    "a bit of the data": lambda step: _flip(step / SECOND, -5),
    "a bit of the header": lambda step: _flip(step / FIRST, 20),
    "a bit of the manifest": lambda step: _flip(step / MANIFEST, -20),
    "missing": lambda step: (step / FIRST).unlink(),
    "exchanged": _exchange,
    "older": lambda step: shutil.copy(step.parent / "step2" / FIRST, step / FIRST),
    "no manifest": lambda step: (step / MANIFEST).unlink(),
    "empty manifest": lambda step: os.truncate(step / MANIFEST, 0),
}


def damaged(method: str, stage: int, folder: str) -> list[tuple[str, str, bool, str, list[str]]]:
    """Load what is damaged in every way, by its tag and without one.

    Returns:
        Of each damage: its name; what the refusal said and whether everything was as before; what was loaded without a
        tag, and what was passed over.
    """
    found = []
    with tensor_parallel_groups():
        engine = engine_of(method, 1, stage)
        data = rule_training.batches(4)
        for batch in data[1:3]:
            run_steps(engine, [data[0], batch] if batch is data[1] else [batch])
            megalr.save_checkpoint(engine, folder)
        run_steps(engine, data[3:])
        newest, whole = Path(folder) / "step3", Path(f"{folder} whole")
        _first(lambda: shutil.copytree(newest, whole))
        for name, damage in DAMAGES.items():
            _first(lambda damage=damage: damage(newest))
            before, message = _all(engine), ""
            try:
                _load(engine, folder, "step3")
            except megalr.UserError as error:
                message = str(error)
            after = _all(engine)
            unchanged = all(same(value, after[key]) for key, value in before.items() if key != "random")
            loaded = _load(engine, folder, None)
            found.append((name, message, unchanged, loaded.folder.name, loaded.skipped))
            run_steps(engine, data[:1])
            _first(lambda: (shutil.rmtree(newest), shutil.copytree(whole, newest)))
        assert _load(engine, folder, None).folder == newest
        engine.destroy()
    return found


def _load(engine: Any, folder: str, tag: str | None) -> megalr.checkpoint.Loaded:
    """While nothing can be unpickled from a file."""
    load, torch_load = pickle.load, torch.load
    pickle.load = torch.load = None
    try:
        return megalr.load_checkpoint(engine, folder, tag)
    finally:
        pickle.load, torch.load = load, torch_load


def _first(do: Callable[[], Any]) -> None:
    dist.barrier()
    if dist.get_rank() == 0:
        do()
    dist.barrier()
