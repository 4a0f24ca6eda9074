"""The folder of one run: what lies in it, which one a new run gets, and what may be deleted."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalr import locks
from megalr.checkpoint.manifest import LATEST
from megalr.checkpoint.publishing import not_ours
from megalr.disk import write_and_sync
from megalr.errors import UserError
from megalr.locks import FolderInUseError, FolderLock
from megalr.train import run_settings

logger = logging.getLogger(__name__)

MOST_WRITTEN = 100_000  # files and folders of monitors and profiles, which are looked at before a run goes on


@dataclass(frozen=True)
class RunFolder:
    """Names of everything that a run writes; nothing else in the folder is ever touched."""

    path: Path

    @property
    def settings(self) -> Path:
        """Arguments, configurations and versions; its presence marks the folder as a run's."""
        return self.path / run_settings.NAME

    @property
    def metrics(self) -> Path:
        """A row for each logged step and each evaluation."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """What :func:`megalr.save_checkpoint` writes."""
        return self.path / "checkpoints"

    @property
    def plot(self) -> Path:
        """The loss curve."""
        return self.path / "loss.png"

    @property
    def summary(self) -> Path:
        """Numbers of the finished run; its presence marks the run as finished."""
        return self.path / "summary.json"

    @property
    def routing(self) -> Path:
        """Which parameter has which rule and owner."""
        return self.path / "routing.txt"

    @property
    def profile(self) -> Path:
        """Traces of profiled updates."""
        return self.path / "profile"

    @property
    def is_taken(self) -> bool:
        """Whether a run is in the folder, finished or not."""
        return any(file.exists() for file in (self.settings, self.metrics, self.checkpoints, self.summary))

    @property
    def can_resume(self) -> bool:
        """Whether there is a checkpoint to continue from."""
        return self.saved_at is not None

    @property
    def has_only_begun(self) -> bool:
        """Whether a run is in the folder that was interrupted before its first checkpoint."""
        return self.settings.exists() and not self.can_resume and not self.summary.exists()

    @property
    def saved_at(self) -> float | None:
        """When the latest checkpoint was finished, in seconds; None without any."""
        # Where a run was killed just before it could say which one is the latest there is none that says so.
        files = [self.checkpoints / LATEST, *self.checkpoints.glob("*/manifest.json")]
        # Not Path.is_file, which raises where a folder cannot be read.
        return max((file.stat().st_mtime for file in files if os.path.isfile(file)), default=None)

    @property
    def folders(self) -> list[Path]:
        """Folders that a run writes."""
        return [self.checkpoints, self.path / "tensorboard", self.path / "csv_monitor", self.profile]

    @property
    def files(self) -> list[Path]:
        """Files that a run writes."""
        return [self.metrics, self.plot, self.summary, self.routing, self.settings]

    @property
    def written(self) -> list[Path]:
        """Everything that a run writes."""
        return [*self.folders, *self.files]

    @property
    def is_free(self) -> bool:
        """Whether a run may be written here without writing over anything."""
        return not any(os.path.lexists(path) for path in self.written)

    @property
    def old_run(self) -> Path:
        """Where a run is that is to be deleted, until the one in its place has made an update."""
        return self.path / ".replaced"

    @property
    def moving(self) -> Path:
        """Where that run is while it is on its way there or back: what is beside it is its own as well."""
        return self.path / ".moving"

    @property
    def has_old_run(self) -> bool:
        """Whether there is one that comes back when the folder is taken."""
        return self.old_run.is_dir() or self.moving.is_dir()

    def set_aside(self) -> None:
        """Make room for a new run; what was written comes back unless :meth:`drop_old_run` is called."""
        self.moving.mkdir()
        for path in self.written:
            if path.exists():
                path.rename(self.moving / path.name)
        self.moving.rename(self.old_run)

    def put_back(self) -> None:
        """Undo :meth:`set_aside`, however far it came, if nothing has come of it."""
        if self.old_run.is_dir():
            self.clear()
            self.old_run.rename(self.moving)
        if self.moving.is_dir():
            for path in self.moving.iterdir():
                path.rename(self.path / path.name)
            self.moving.rmdir()

    def drop_old_run(self) -> None:
        """Delete what was set aside, and what killed deletions have left."""
        # A kill in mid-deletion must not have the rest come back as if it were a run.
        if self.old_run.is_dir():
            self.old_run.rename(self.path / f".deleted-{time.time_ns()}")
            for dropped in self.path.glob(".deleted-*"):
                shutil.rmtree(dropped, ignore_errors=True)
                if dropped.exists():
                    logger.warning("%s, of the run that was replaced, cannot be deleted: delete it yourself", dropped)

    def clear(self) -> None:
        """Delete what a run has written."""
        for path in self.written:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def keep_metrics(self) -> Path | None:
        """Rename the metrics of a run that is to begin anew; the new name, None where there are none."""
        if not self.metrics.exists():
            return None
        kept = self.metrics.with_name(f"metrics-{self.metrics.stat().st_mtime_ns}.jsonl")
        return self.metrics.rename(kept)


def take_run_folder(name: str, output: str | None, *, resume: bool, overwrite: bool, lock: FolderLock) -> RunFolder:
    """The folder of this run, held against other writers; deletes nothing.

    Args:
        name: the configuration's, for the default ``runs/<name>``, ``runs/<name>-2``, ...
        output: the folder that the user asked for, or None for the default.
        resume: the run is to be continued: without ``output``, the one with the latest checkpoint; with it also one
            that has only begun.
        overwrite: a run in the folder may be deleted.
        lock: takes the folder.

    Raises:
        UserError: the folder is taken, is a file, is in use (which is said first), or has nothing to resume from.
    """
    if output is not None:
        folder = RunFolder(Path(output).expanduser())
        if not folder.path.is_dir():
            _check(folder, resume=resume, overwrite=overwrite)  # before it is made
        _hold(folder, lock)
        _check(folder, resume=resume, overwrite=overwrite)
        return folder
    numbered = _default_folders(name)
    if resume:
        for folder in numbered:
            if folder.has_old_run:
                with contextlib.suppress(FolderInUseError), FolderLock() as other:
                    _hold(folder, other)
        candidates = [folder for folder in numbered if folder.can_resume]
        if not candidates:
            raise UserError(f"there is no checkpoint under {numbered[0].path}: name the run's folder with --output")
        folder = max(candidates, key=lambda folder: folder.saved_at or 0.0)
        _hold(folder, lock)
        _check_kinds(folder)
        _check_inner_kinds(folder)
        return folder
    if overwrite:
        _hold(numbered[0], lock)
        _check(numbered[0], resume=False, overwrite=True)
        return numbered[0]
    for number in itertools.count(1):
        folder = _numbered(name, number)
        if not folder.is_free:
            continue
        with contextlib.suppress(FolderInUseError):  # of a run that has written nothing yet
            _hold(folder, lock)
            if folder.is_free:
                break
            lock.release()  # a run has begun, and ended, meanwhile, or has come back
    return folder


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` so that a kill leaves the old file or the new one, never half of one."""
    temporary = path.with_name(f".{path.name}.part")
    write_and_sync(temporary, json.dumps(content, indent=2, default=str) + "\n")
    os.replace(temporary, path)


def _default_folders(name: str) -> list[RunFolder]:
    """``runs/<name>``, then those with a number, up to and including the first free one."""
    found = [_numbered(name, 1)]
    while found[-1].is_taken or found[-1].has_old_run:
        found.append(_numbered(name, len(found) + 1))
    return found


def _numbered(name: str, number: int) -> RunFolder:
    return RunFolder(Path("runs") / (name if number == 1 else f"{name}-{number}"))


def _hold(folder: RunFolder, lock: FolderLock) -> None:
    """Keep others out; what a killed ``--overwrite`` had set aside comes back."""
    _check_kinds(folder)
    try:
        lock.take(folder.path)
        folder.put_back()
    except OSError as error:
        raise UserError(
            f"{folder.path} cannot be written: {error.strerror} ({error.filename}): name another folder with --output"
        ) from error


def _check_kinds(folder: RunFolder) -> None:
    """Refuse what is no file or folder where a run has one, such as a pipe, which never ends, and links out of the run.

    Folders that a run writes into may be links, as ``checkpoints`` to a larger disk, but not those that it moves.
    """
    parts = [path.with_name(f".{path.name}.part") for path in folder.files]
    own = [*folder.files, *parts, folder.path / locks.NAME]
    moved = [folder.old_run, folder.moving]
    for path in (*own, *moved, *folder.folders, folder.checkpoints / LATEST):
        if os.path.islink(path) and path in (*own, *moved):
            raise UserError(
                f"{path} is a symbolic link to {os.readlink(path)}, and a run writes there: delete the link, or name "
                "another folder with --output"
            )
        # Not Path.is_file, which raises where a folder cannot be read.
        is_folder = path in (*moved, *folder.folders)
        if os.path.lexists(path) and not (os.path.isdir(path) if is_folder else os.path.isfile(path)):
            raise UserError(
                f"{path} is no {'folder' if is_folder else 'file'}, which a run writes there: move it elsewhere, or "
                "name another folder with --output"
            )


def _check_inner_kinds(folder: RunFolder) -> None:
    """Refuse links and pipes where monitors and profiles go on writing: they follow links, and a pipe never ends.

    Checkpoints are left out: none is written into a folder that is there.
    """
    waiting = [path for path in folder.folders if path != folder.checkpoints and path.is_dir()]
    seen = 0
    while waiting:
        inner = waiting.pop()
        try:
            with os.scandir(inner) as entries:
                for entry in entries:
                    seen += 1
                    _check_entry(entry)
                    if seen > MOST_WRITTEN:
                        raise UserError(
                            f"{inner} and the like hold more than {MOST_WRITTEN:,} files: move them elsewhere, or name "
                            "another folder with --output"
                        )
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(Path(entry.path))
        except OSError as error:
            raise UserError(f"{inner} cannot be read: {error.strerror}") from error


def _check_entry(entry: os.DirEntry[str]) -> None:
    if entry.is_symlink():
        raise UserError(
            f"{entry.path} is a symbolic link to {os.readlink(entry.path)}, and a run writes there: delete the link, "
            "or name another folder with --output"
        )
    if not (entry.is_file(follow_symlinks=False) or entry.is_dir(follow_symlinks=False)):
        raise UserError(
            f"{entry.path} is no file, which a run writes there: move it elsewhere, or name another folder with "
            "--output"
        )


def _check(folder: RunFolder, *, resume: bool, overwrite: bool) -> None:
    if folder.path.exists() and not folder.path.is_dir():
        raise UserError(f"--output {folder.path} is a file: name a folder")
    _check_kinds(folder)
    if resume:
        _check_inner_kinds(folder)
    foreign = _foreign_checkpoints(folder)
    if resume and not (folder.can_resume or folder.has_only_begun):
        raise UserError(f"there is no checkpoint in {folder.checkpoints}, so there is nothing to resume")
    strange = [] if folder.is_taken else [path.name for path in folder.written if path.exists()]
    if strange:
        raise UserError(
            f"{folder.path} holds {', '.join(strange)}, which a run would write over, and holds no run: name another "
            "folder with --output"
        )
    begins_anew = overwrite or (resume and folder.has_only_begun)
    if begins_anew and folder.is_taken and not run_settings.is_a_runs(folder.settings):
        there = ", ".join(path.name for path in folder.written if path.exists())
        state = "and none of a run" if folder.settings.exists() else "and no run.json, which a run writes first"
        raise UserError(
            f"{folder.path} holds {there}, {state}: what no run has written is not deleted. Delete it yourself, or "
            "name another folder with --output"
        )
    if begins_anew and foreign:
        raise UserError(
            f"{folder.checkpoints} holds {', '.join(foreign[:3])}, which no run has written, and all there would be "
            "deleted: move it elsewhere, or name another folder with --output"
        )
    links = [path for path in folder.written if path.is_symlink()]
    if overwrite and links:
        raise UserError(
            f"{links[0]} is a symbolic link to {links[0].resolve()}, where --overwrite deletes nothing: delete what "
            "is there and the link, or name another folder with --output"
        )
    if folder.is_taken and not (resume or overwrite):
        state = "a finished run" if folder.summary.exists() else "an unfinished run"
        raise UserError(
            f"{folder.path} holds {state}: add --resume to continue it, --overwrite to delete it, or name "
            "another folder with --output"
        )


def _foreign_checkpoints(folder: RunFolder) -> list[str]:
    """What lies among the checkpoints and is none; one that cannot be read is not one that is not there."""
    try:
        return not_ours(folder.checkpoints) if os.path.lexists(folder.checkpoints) else []
    except OSError as error:
        raise UserError(f"{folder.checkpoints} cannot be read: {error.strerror}") from error
