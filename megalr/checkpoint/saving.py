"""Writing an engine's checkpoint, at once or beside the training that goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from megalr.checkpoint.contents import Contents
from megalr.checkpoint.manifest import candidates
from megalr.checkpoint.planners import EntrySaver
from megalr.checkpoint.storage import FolderWriter
from megalr.errors import UserError
from megalr.partition.pieces import Entry, Piece

VERSIONS_OF = ("megalr", "torch", "deepspeed", "transformers")


def save_checkpoint(
    engine: Any,
    directory: str | Path,
    tag: str | None = None,
    *,
    client_state: Mapping[str, Any] | None = None,
    keep: int | None = None,
    asynchronous: bool = False,
) -> Path:
    """Write a checkpoint that any ZeRO stage, number of processes and tensor-parallel size can load. Collective.

    It is written to a hidden folder and renamed when all of it is on the disk; whatever is interrupted, what was
    there before stays. To be called between updates: gradients of one that has begun are not kept.

    Args:
        engine: of ``megalr.initialize``, or DeepSpeed's with ``megalr.build_optimizer``.
        directory: of all checkpoints, which all processes see.
        tag: the checkpoint's folder in there; ``step<updates>`` if None. One of that name is replaced.
        client_state: whatever else is to be kept, as JSON has it; the first process's.
        keep: how many checkpoints to leave in the folder, this one among them; None for all.
        asynchronous: come back when all has been copied to host memory, and write beside the training. The next call,
            or :func:`wait_for_checkpoint`, waits for it and raises what went wrong.

    Returns:
        The checkpoint's folder.

    Raises:
        UserError: it could not be written, on all ranks; or the state cannot be kept.
    """
    saver = Saver.current()
    saver.wait()
    contents = Contents(engine)
    numbers, entries = contents.numbers(), contents.entries()
    updates = numbers["optimizer"]["updates"]
    place, tag = Path(directory).expanduser().absolute(), tag or f"step{updates}"
    _check_tag(tag)
    document = {
        "numbers": {key: value for key, value in numbers.items() if key != "matrices"},
        "client": dict(client_state or {}),
        "layout": _layout(engine),
        "config": engine.basic_optimizer.sections,
        "model": _model_config(engine),
        "versions": {name: version(name) for name in VERSIONS_OF},
    }
    writer = FolderWriter(place, tag, document, keep)
    if asynchronous:
        entries = _copied(entries)
    planner = EntrySaver(entries, numbers["matrices"])
    saver.start(lambda: _write(writer, planner, saver.group, place / tag))
    if not asynchronous:
        saver.wait()
    return place / tag


def wait_for_checkpoint() -> None:
    """Wait for what ``save_checkpoint(..., asynchronous=True)`` has begun, if anything. Collective.

    Raises:
        UserError: it could not be written.
    """
    Saver.current().wait()


class Saver:
    """The thread that writes, and the group that the processes talk by meanwhile.

    Attributes:
        group: all processes, by gloo; None where there is but one. Of its own, so that messages do not meet those of
            the training, and on the CPU, so that none waits for what a GPU has to do.
    """

    _current: ClassVar[tuple[Any, Saver] | None] = None

    def __init__(self) -> None:
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._pool = ThreadPoolExecutor(1, "megalr-checkpoint")
        self._pending: Future[None] | None = None

    @classmethod
    def current(cls) -> Saver:
        """That of the processes that there are now; collective when it is the first call."""
        world = dist.group.WORLD if dist.is_initialized() else None
        if cls._current is None or cls._current[0] is not world:
            cls._current = (world, cls())
        return cls._current[1]

    def start(self, write: Any) -> None:
        """Have it done beside."""
        self._pending = self._pool.submit(write)

    def wait(self) -> None:
        """Wait until it is done, and raise what it raised."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


def _write(writer: FolderWriter, planner: EntrySaver, group: dist.ProcessGroup | None, place: Path) -> None:
    try:
        dcp.save({}, storage_writer=writer, planner=planner, process_group=group, no_dist=group is None)
    except CheckpointException as error:
        causes = [f"process {rank}: {cause}" for rank, (cause, _) in sorted(error.failures.items())]
        before, _ = candidates(place.parent)
        left = f"the newest one is {before[0].folder}" if before else "there is none yet"
        raise UserError(
            f"{place} could not be written: {'; '.join(causes)}. Checkpoints written before are as they were: {left}"
        ) from error


def _copied(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """The same in host memory that nothing else writes."""
    return {
        key: replace(entry, pieces=tuple(Piece(p.offsets, p.data.detach().to("cpu", copy=True)) for p in entry.pieces))
        for key, entry in entries.items()
    }


def _layout(engine: Any) -> dict[str, Any]:
    from deepspeed.utils import groups  # noqa: PLC0415  (there is an engine, so it has been imported)
    from deepspeed.utils.bwc import bwc_tensor_model_parallel_world_size  # noqa: PLC0415

    return {
        "stage": int(engine.zero_optimization_stage()),
        "processes": dist.get_world_size() if dist.is_initialized() else 1,
        "tensor_parallel": int(bwc_tensor_model_parallel_world_size(groups.mpu)),
        "dtype": str(engine.get_data_types()[0]).removeprefix("torch."),
    }


def _model_config(engine: Any) -> Any:
    """Of a transformers model, for exports; with the name of its class, which it has else only when it is saved."""
    to_json = getattr(getattr(engine.module, "config", None), "to_json_string", None)
    if to_json is None:
        return None
    return json.loads(to_json(use_diff=False)) | {"architectures": [type(engine.module).__name__]}


def _check_tag(tag: str) -> None:
    if tag != Path(tag).name or tag.startswith(".") or tag == "latest":
        raise UserError(f'tag is "{tag}": write a plain folder name, such as "step100"')
