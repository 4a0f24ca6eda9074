"""What processes do that are killed while they save, or find the disk full."""

from __future__ import annotations

import datetime
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megalr.checkpoint.folders import candidates
from megalr.checkpoint.loading import _find, _from_first, read_entries
from megalr.checkpoint.saving import Saver, wait_for_checkpoint, write_entries
from megalr.errors import UserError
from tests import known_state
from tests.known_state import document, entries

CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir")  # of a folder; the names are those of audit events
BALLAST = "ballast"


class Deaths:
    """Has this process killed when a save comes to a certain point: before something that it does to the disk.

    Attributes:
        seen: what has been done since the counting began.
    """

    def __init__(self, directory: Path, point: int | str | None, everyone: list[int] | None = None) -> None:
        """
        Args:
            directory: of the checkpoints.
            point: which thing, by its number or the begin of its name; None for none, to see what there is.
            everyone: processes that are killed as well.
        """
        self.seen: list[str] = []
        self._directory, self._point, self._others = str(directory), point, everyone or []
        self._counting = False
        sync = os.fsync

        def fsync(handle: int) -> None:
            self._happens("fsync")
            sync(handle)

        os.fsync = fsync
        sys.addaudithook(self._audit)

    def count(self) -> None:
        """Begin."""
        self._counting = True

    def stop(self) -> None:
        """End."""
        self._counting = False

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if not self._counting:
            return
        if event == "open" and args[1] in ("w", "wb") and str(args[0]).startswith(self._directory):
            self._happens(f"open {Path(args[0]).name}")
        elif event in CHANGES:
            self._happens(f"{event} {Path(os.fsdecode(args[0])).name}")

    def _happens(self, what: str) -> None:
        if self._counting:
            point = self._point
            if point == len(self.seen) or (isinstance(point, str) and what.startswith(point)):
                for process in [*self._others, os.getpid()]:
                    os.kill(process, signal.SIGKILL)
            self.seen.append(what)


def saving(
    report: Callable[..., None],
    rank: int,
    world_size: int,
    rendezvous: str,
    folder: str,
    updates: int,
    *,
    asynchronous: bool = False,
    tag: str | None = None,
    keep: int | None = 2,
    columns: int = known_state.LIGHT,
    die: tuple[int, int, int | None, bool] | None = None,
    full: tuple[int, int, int] | None = None,
) -> None:
    """Load the newest checkpoint, look at it, go on from it and save after each update.

    Args:
        report: says something.
        rank, world_size, rendezvous: of the group.
        folder: of the checkpoints.
        updates: how many to make.
        asynchronous, tag, keep: as for ``save_checkpoint``.
        columns: see :func:`tests.known_state.shapes`.
        die: which save, who, before which thing, and whether all die.
        full: which save, who, and how large that one's files may become from then on until a save has failed.
    """
    init, limit = f"file://{rendezvous}", datetime.timedelta(seconds=50)
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=world_size, timeout=limit)
    processes: list[Any] = [None] * world_size
    dist.all_gather_object(processes, os.getpid())
    directory, saver = Path(folder), Saver.current()
    deaths = None
    if die is not None and die[1] == rank:
        deaths = Deaths(directory, die[2], [p for p in processes if p != os.getpid()] if die[3] else [])
    done = _load(report, rank, directory, columns)
    saved = done
    for number in range(updates):
        done += 1
        count = torch.ones(())
        dist.all_reduce(count)  # an update needs all
        assert count.item() == world_size
        if full is not None and (number, rank) == full[:2]:
            _limit_files(full[2])
        if deaths is not None and number == die[0]:
            wait_for_checkpoint()  # the save before is not counted, however far it has come beside
            deaths.count()
        report(begin=done, number=number)
        since = time.perf_counter()
        try:
            state = entries(done, rank, world_size, columns)
            name = tag or f"step{done}"
            write_entries(directory, name, document(done), state, {}, keep=keep, asynchronous=asynchronous)
            if asynchronous:
                for entry in state.values():
                    entry.pieces[0].data.zero_()  # what has been copied may change
        except UserError as error:
            if full is None:
                raise
            dist.barrier()
            report(failed=done, message=str(error), leftovers=_hidden(directory))
            dist.barrier()
            _limit_files(resource.RLIM_INFINITY)
            (directory / BALLAST).unlink(missing_ok=True)
            dist.barrier()
            continue
        report(returned=done - asynchronous, seconds=time.perf_counter() - since)
        saved = done
    wait_for_checkpoint()
    report(returned=saved)
    if deaths is not None:
        deaths.stop()
        report(seen=deaths.seen)
    assert saver is Saver.current()
    dist.destroy_process_group()


def _load(report: Callable[..., None], rank: int, directory: Path, columns: int) -> int:
    """The count of updates in what could be loaded, whose values are known."""
    group = Saver.current().group
    anything = _from_first(group, lambda: bool(candidates(directory)))
    if not anything:
        return 0
    manifest, skipped = _from_first(group, lambda: _find(directory, None))
    wanted = entries(None, dist.get_rank(), dist.get_world_size(), columns)
    read_entries(manifest, wanted, group)
    known = entries(manifest.updates, dist.get_rank(), dist.get_world_size(), columns)
    wrong = [k for k, e in wanted.items() if not torch.equal(e.pieces[0].data, known[k].pieces[0].data)]
    report(loaded=manifest.updates, folder=manifest.folder.name, skipped=skipped, wrong=wrong)
    return manifest.updates


def _hidden(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob(".*"))


def _limit_files(size: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that writing fails instead of ending the process
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
