"""Writing an engine's checkpoint, at once or beside the training that goes on."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from dataclasses import replace
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from megalr.checkpoint.arguments import check_keep, check_tag, folder_of
from megalr.checkpoint.contents import Contents
from megalr.checkpoint.folders import candidates
from megalr.checkpoint.planners import EntrySaver
from megalr.checkpoint.publishing import abandon
from megalr.checkpoint.storage import FolderWriter
from megalr.errors import UserError
from megalr.hosts import host_of
from megalr.hosts.base import RunningHost
from megalr.layout.rectangles import Entry, Piece
from megalr.naming import unwrapped

logger = logging.getLogger(__name__)

# All wait for the slowest disk, and to load for the first process, which reads every byte.
PATIENCE = timedelta(hours=6)
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

    The checkpoint is written to a hidden folder and renamed when all of it is on the disk, so an interruption never
    damages an older one. Call it between updates: gradients of an update that has begun are not saved.

    Args:
        engine: of ``megalr.initialize``, or DeepSpeed's with ``megalr.build_optimizer``.
        directory: folder of all checkpoints, which all processes can see.
        tag: name of the checkpoint's folder in it; ``step<updates>`` if None. An existing one is replaced.
        client_state: anything else to save, as JSON values; taken from the first process.
        keep: number of checkpoints to keep in the folder, including this one; None for all.
        asynchronous: return once everything is copied to host memory, and write in a thread. The next call, or
            :func:`wait_for_checkpoint`, waits for the thread and raises its errors.

    Returns:
        The checkpoint's folder.

    Raises:
        UserError: on all ranks: the checkpoint could not be written.
    """
    place = folder_of(directory)
    contents, host = Contents(engine), host_of(engine)
    numbers, entries = contents.numbers(), contents.entries()
    updates = numbers["optimizer"]["updates"]
    tag = f"step{updates}" if tag is None else tag
    check_tag(tag)
    check_keep(keep)
    document = {
        "numbers": {key: value for key, value in numbers.items() if key != "matrices"},
        "client": {} if client_state is None else _as_it_is(client_state),
        "layout": _layout(host),
        "config": host.optimizer.sections,
        "model": _model_config(host.module),
        "versions": {name: version(name) for name in VERSIONS_OF},
    }
    write_entries(place, tag, document, entries, numbers["matrices"], keep=keep, asynchronous=asynchronous)
    return place / tag


def write_entries(
    directory: Path,
    tag: str,
    document: Mapping[str, Any],
    entries: Mapping[str, Entry],
    matrices: Mapping[str, Any],
    *,
    keep: int | None,
    asynchronous: bool,
) -> None:
    """Write tensors and numbers, whatever they are of; see :func:`save_checkpoint`.

    Args:
        directory, tag, keep, asynchronous: as there.
        document: what the manifest is to say.
        entries: this rank's.
        matrices: numbers that this rank alone has.
    """
    saver = Saver.current()
    saver.wait()
    writer = FolderWriter(directory, tag, document, keep)
    planner = EntrySaver(saver.copied(entries) if asynchronous else entries, deepcopy(matrices))
    saver.start(lambda: _write(writer, planner, saver, directory / tag), asynchronous)
    if not asynchronous:
        saver.wait()


def wait_for_checkpoint() -> None:
    """Wait until an asynchronous :func:`megalr.save_checkpoint` has finished, if there is one. Collective.

    Raises:
        UserError: the checkpoint could not be written.
    """
    Saver.current().wait()


class Saver:
    """The thread that writes, and the group that the processes talk by meanwhile.

    Attributes:
        group: all processes, by gloo; None where there is but one. Of its own, so that messages do not meet those of
            the training, and on the CPU, so that none waits for what a GPU has to do.
        is_first: whether this is the first of them.
    """

    _current: ClassVar[tuple[Any, Saver] | None] = None

    def __init__(self) -> None:
        self.group = dist.new_group(backend="gloo", timeout=PATIENCE) if dist.is_initialized() else None
        self.is_first = self.group is None or dist.get_rank() == 0
        self._pool = ThreadPoolExecutor(1, "megalr-checkpoint")
        self._pending: Future[None] | None = None
        # What was copied last, by key and place; kept, since memory that is new costs more than the copy itself.
        self._copies: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    @classmethod
    def current(cls) -> Saver:
        """That of the processes that there are now; collective when it is the first call."""
        world = dist.group.WORLD if dist.is_initialized() else None
        if cls._current is None or cls._current[0] is not world:
            cls._current = (world, cls())
        return cls._current[1]

    def copied(self, entries: Mapping[str, Entry]) -> dict[str, Entry]:
        """The same in host memory that nothing else writes before the next call."""
        before, self._copies = self._copies, {}
        found = {}
        for key, entry in entries.items():
            pieces = [Piece(p.offsets, self._copy(before, key, p)) for p in entry.pieces]
            found[key] = replace(entry, pieces=tuple(pieces))
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # copies to pinned memory come back before they are made
        return found

    def _copy(self, before: Mapping[tuple[str, tuple[int, ...]], Tensor], key: str, piece: Piece) -> Tensor:
        where, data = (key, piece.offsets), piece.data.detach()
        copy = before.get(where)
        if copy is None or copy.shape != data.shape or copy.dtype != data.dtype:
            copy = torch.empty(data.shape, dtype=data.dtype, pin_memory=data.is_cuda)
        self._copies[where] = copy.copy_(data, non_blocking=data.is_cuda)
        return copy

    def start(self, write: Callable[[], None], asynchronous: bool) -> None:
        """Have it done beside; what goes wrong while nobody waits is in the log before :meth:`wait` raises it."""
        self._pending = self._pool.submit(_logged(write) if asynchronous and self.is_first else write)

    def wait(self) -> None:
        """Wait until it is done, and raise what it raised."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


def _write(writer: FolderWriter, planner: EntrySaver, saver: Saver, place: Path) -> None:
    group = saver.group
    try:
        dcp.save({}, storage_writer=writer, planner=planner, process_group=group, no_dist=group is None)
    except CheckpointException as error:
        failed: BaseException = error
        what, causes = (
            "could not be written",
            "; ".join(f"process {rank}: {_words(cause)}" for rank, (cause, _) in sorted(error.failures.items())),
        )
    except Exception as error:  # of the group: what a process raises itself comes as the other
        failed, what = error, "may not have been written"
        causes = (
            "processes have lost each other, one may have died, or ended its process group without "
            f"megalr.wait_for_checkpoint() ({str(error).partition('. ')[0]})"
        )
    else:
        return
    if saver.is_first:
        abandon(place.parent, place.name)
    before = [manifest for manifest in candidates(place.parent) if not manifest.folder.name.startswith(".")]
    left = f"the newest one is {before[0].folder}" if before else "there is none yet"
    raise UserError(f"{place} {what}: {causes}. Checkpoints written before are as they were: {left}") from failed


def _logged(write: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        try:
            write()
        except Exception as error:
            logger.error("%s", error)
            raise

    return run


def _words(cause: BaseException) -> str:
    return str(cause) if isinstance(cause, OSError | UserError) else repr(cause)


def _as_it_is(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """A copy, which the caller does not change while it is written; what JSON cannot hold is refused by all ranks."""
    try:
        copy: Mapping[str, Any] = json.loads(json.dumps(dict(state) if isinstance(state, Mapping) else state))
    except (TypeError, ValueError, RecursionError):
        return state
    return copy


def _layout(host: RunningHost) -> dict[str, Any]:
    return {
        "stage": host.stage,
        "processes": dist.get_world_size() if dist.is_initialized() else 1,
        "tensor_parallel": host.groups().tensor_size,
        "dtype": str(host.dtypes[0]).removeprefix("torch."),
    }


def _model_config(module: nn.Module) -> Any:
    """Of a transformers model, for exports; with the name of its class, which it has else only when it is saved."""
    to_json = getattr(getattr(module, "config", None), "to_json_string", None)
    if to_json is None:
        return None
    return json.loads(to_json(use_diff=False)) | {"architectures": [type(unwrapped(module)).__name__]}
