"""Reading a checkpoint into an engine of any layout."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from megalr.checkpoint.arguments import check_saved_tag, folder_of
from megalr.checkpoint.contents import Contents
from megalr.checkpoint.folders import candidates, latest, newest_whole, read_or_offer
from megalr.checkpoint.manifest import MANIFEST, Manifest, check_same
from megalr.checkpoint.planners import EntryLoader
from megalr.checkpoint.publishing import find
from megalr.checkpoint.reading import outlines, read_tensor
from megalr.checkpoint.saving import Saver
from megalr.checkpoint.storage import FolderReader
from megalr.checkpoint.values import FROZEN, TRAINED
from megalr.errors import UserError, some_of
from megalr.layout.rectangles import Entry
from megalr.optim.loading import check_shapes

logger = logging.getLogger(__name__)
T = TypeVar("T")
KINDS = frozenset({*TRAINED, FROZEN, "buffers", "random"})  # of what this package keeps
PARTLY = "A part has been loaded: do not go on training before another load has succeeded"


@dataclass(frozen=True)
class Loaded:
    """The result of :func:`megalr.load_checkpoint`.

    Attributes:
        folder: folder of the checkpoint that was loaded.
        updates: number of updates before it was written.
        client_state: the ``client_state`` that it was saved with.
        skipped: newer checkpoints that were not loaded, each with the reason.
        dropped: saved state that this engine's optimizer cannot use, in words; empty if everything was loaded.
    """

    folder: Path
    updates: int
    client_state: Mapping[str, Any]
    skipped: list[str] = field(default_factory=list)
    dropped: str = ""


def load_checkpoint(engine: Any, directory: str | Path, tag: str | None = None) -> Loaded:
    """Load a checkpoint of :func:`megalr.save_checkpoint`, from any ZeRO stage and number of processes. Collective.

    All files are checked before anything is changed. If the optimizer has another rule than the checkpoint, and the
    layers keep nothing beside their weights, then weights and counts are loaded and moments start at zero; a warning
    and the result say what was dropped.

    Args:
        engine: an engine with the same model and the same shapes of the state as the one that saved.
        directory: the folder that ``save_checkpoint`` was given, or the folder of one checkpoint in it.
        tag: name of the checkpoint; None for the newest one with intact files, whatever ``latest`` names.

    Returns:
        What was loaded.

    Raises:
        UserError: there is no checkpoint; it is damaged (the message names files, parameters, and the newest intact
            one); or it is of another model.
    """
    saver = Saver.current()
    saver.wait()
    place = folder_of(directory)
    check_saved_tag(tag)
    if tag is None and os.path.isfile(place / MANIFEST):
        place, tag = place.parent, place.name
    manifest, skipped = _from_first(saver.group, lambda: _find(place, tag))
    if saver.is_first:
        for note in [*(f"passed over: {line}" for line in skipped), *_of_latest(place, tag, manifest)]:
            logger.warning(note)
    return replace(load_whole(engine, manifest), skipped=skipped)


@torch.no_grad()
def load_whole(engine: Any, manifest: Manifest) -> Loaded:
    """Load a checkpoint whose files have been checked; see :func:`load_checkpoint`. Collective."""
    saver, contents = Saver.current(), Contents(engine)
    numbers, saved = manifest.content["numbers"], outlines(manifest)

    def read(key: str) -> Tensor:
        return read_tensor(manifest, key)

    def check() -> str:
        taken = _taken(manifest, lambda: contents.check(numbers, saved, read))
        check_same(manifest)  # a run may have been built since its files were checked
        return taken

    dropped = _together(saver.group, check, "Nothing was loaded")
    _together(saver.group, partial(_taken, manifest, lambda: _make_room(contents, manifest, saved)), PARTLY)
    _refuse_untaken(contents, saved, saver.group)
    read_entries(manifest, contents.targets(), saver.group)
    _taken(manifest, lambda: contents.settle(numbers))
    notes = [f"dropped of {manifest.folder}, to begin anew: {dropped}"] if dropped else []
    if saver.is_first:
        for note in notes + contents.notes:
            logger.warning(note)
    return Loaded(manifest.folder, manifest.updates, manifest.content["client"], dropped=dropped)


def read_entries(manifest: Manifest, wanted: Mapping[str, Entry], group: dist.ProcessGroup | None) -> None:
    """Read tensors of a checkpoint whose files have been checked. Collective.

    Args:
        manifest: the checkpoint's.
        wanted: to be read into.
        group: of all processes; None for one that is alone.

    Raises:
        UserError: a file could not be read after all, or another save has taken its place; on all ranks alike.
    """
    reader, planner = FolderReader(manifest), EntryLoader(wanted)
    try:
        dcp.load({}, storage_reader=reader, planner=planner, process_group=group, no_dist=group is None)
    except CheckpointException as error:
        causes = "; ".join(f"process {rank}: {cause}" for rank, (cause, _) in sorted(error.failures.items()))
        raise UserError(f"{manifest.folder} was whole, and yet could not be loaded: {causes}. {PARTLY}") from error


def _find(place: Path, tag: str | None) -> tuple[Manifest, list[str]]:
    """The checkpoint to load, its files checked."""
    if tag is None:
        return newest_whole(place)
    return read_or_offer(find(place, tag), place / tag, "Nothing was loaded"), []


def _of_latest(place: Path, tag: str | None, loaded: Manifest) -> list[str]:
    """A note for who has written an older checkpoint's name into ``latest``, as one goes back with DeepSpeed's."""
    named = latest(place)
    if tag is not None or named in (None, loaded.folder.name):
        return []
    if named not in (other.folder.name for other in candidates(place) if other.order < loaded.order):
        return []
    return [f'`latest` names {named}, which was written before {loaded.folder.name}: tag="{named}" loads it']


def _make_room(contents: Contents, manifest: Manifest, saved: Mapping[str, Tensor]) -> None:
    contents.make_room(manifest.content["numbers"], saved)
    missing = [key for key in contents.targets() if key not in manifest.tensors]
    if missing:
        raise UserError(f"{manifest.folder} lacks {', '.join(missing[:3])}: another version of megalr has written it")
    # Of what layers keep, which is only known now; moments and states were looked at before anything was changed.
    check_shapes({key: entry.shape for key, entry in contents.targets().items()}, saved)


def _refuse_untaken(contents: Contents, saved: Iterable[str], group: dist.ProcessGroup | None) -> None:
    """Refuse what events of a user's layers have saved and no process prepares a place for; on all ranks alike."""
    left = {key for key in saved if key.partition("/")[0] not in KINDS} - contents.targets().keys()
    if group is not None:
        every: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(every, left, group=group)
        left = set.intersection(*every)
    if left:
        raise UserError(
            f"the checkpoint has {some_of(sorted(left))}, for which the layers' events prepare nothing: make_room() "
            f"has to allocate every tensor that entries() returns. {PARTLY}"
        )


def _taken(manifest: Manifest, act: Callable[[], T]) -> T:
    """What it makes of a checkpoint's numbers, which may be anybody's; a UserError where it cannot use them."""
    try:
        return act()
    except UserError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise UserError(
            f"{manifest.folder} says of the optimizer's state what this engine cannot take up "
            f"({type(error).__name__}: {error}): load another checkpoint"
        ) from error


def _together(group: dist.ProcessGroup | None, act: Callable[[], T], otherwise: str) -> T:
    """What it returns; where it fails on some processes, it has failed on all, which would wait for those else.

    Args:
        group: of all processes; None for one that is alone.
        act: what to do.
        otherwise: where that leaves the processes on which it has not failed.
    """
    if group is None:
        return act()
    failed: Exception | None = None
    try:
        done = act()
    except Exception as error:
        failed = error
    words: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(words, None if failed is None else str(failed), group=group)
    if failed is not None:
        raise failed
    others = [f"process {rank}: {said}" for rank, said in enumerate(words) if said is not None]
    if others:
        raise UserError(f"another process could not load: {others[0]}. {otherwise}")
    return done


def _from_first(group: dist.ProcessGroup | None, find: Callable[[], Any]) -> Any:
    """What the first process finds, on all of them; or what it raises."""
    if group is None:
        return find()
    found: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            found = [find()]
        except Exception as error:
            # Whatever it is: the others wait for an answer. They get it in words, as not every exception can be sent.
            dist.broadcast_object_list([UserError(str(error))], src=0, group=group)
            raise
    dist.broadcast_object_list(found, src=0, group=group)
    if isinstance(found[0], UserError):
        raise found[0]
    return found[0]
