"""One writer of a folder at a time, told to the next one by name."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shlex
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil  # type: ignore[import-untyped]

from megalr.disk import make_folder
from megalr.errors import UserError

logger = logging.getLogger(__name__)

NAME = ".writer.json"
# What file systems answer that have no locks, such as Lustre mounted without them.
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
# What says that a file is not there; whatever else cannot be found out says nothing.
GONE = {errno.ENOENT, errno.ENOTDIR, errno.ESTALE}

_open: set[int] = set()  # descriptors of locks, which forked children must not keep


class FolderInUseError(UserError):
    """Somebody else writes into the folder."""


class FolderGoneError(UserError):
    """The folder that was held is no longer where it was."""


class FolderLock:
    """Holds a folder for as long as this process lives, or until the end of a ``with`` block.

    The kernel lets go of the lock when its holder ends, however it ends, so a file that is left behind means nothing.
    File systems that are shared between nodes pass the lock on, NFS and Lustre among them, unless they were mounted
    without locks. There the process that the file names is looked for, which finds it on the same node only.
    """

    def __init__(self) -> None:
        self._path: Path | None = None
        self._handle = -1
        self._made: list[Path] = []

    @property
    def held(self) -> bool:
        """Whether a folder is held."""
        return self._path is not None

    def take(self, folder: Path) -> None:
        """Hold a folder, which is made if it is not there.

        Raises:
            FolderInUseError: naming who holds it, since when, and what to do.
        """
        made = [each for each in (folder, *folder.parents) if not each.exists()]
        make_folder(folder)
        path = folder / NAME
        while True:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                _lock(handle, folder)
                # Who held it before may have removed the file between the two calls.
                if _is_at(handle, path):
                    break
            except BaseException:
                os.close(handle)
                raise
            os.close(handle)
        process = psutil.Process()
        holder = {"host": socket.gethostname(), "pid": process.pid, "started": process.create_time()}
        os.ftruncate(handle, 0)
        os.pwrite(handle, (json.dumps(holder) + "\n").encode(), 0)
        _open.add(handle)
        self._path, self._handle, self._made = path, handle, made

    @property
    def is_in_place(self) -> bool:
        """Whether what is held is still where it was, and nobody else can hold that place; so where nothing is held."""
        return self._path is None or _is_at(self._handle, self._path)

    def check(self) -> None:
        """Make sure, before anything is written, that the folder is still the one that is held.

        Raises:
            FolderGoneError: it was moved or deleted, saying where it is now, if that is known, and what to do.
        """
        if not self.is_in_place:
            assert self._path is not None
            raise FolderGoneError(_gone(self._path, self._handle))

    def release(self) -> None:
        """Let go, and remove the folder if it is new and still empty."""
        if self._path is None:
            return
        is_ours = self.is_in_place  # else it may be the next one's
        if is_ours:
            self._path.unlink(missing_ok=True)
        _open.discard(self._handle)
        os.close(self._handle)
        for folder in self._made if is_ours else []:
            try:
                folder.rmdir()
            except OSError:  # there is something in it
                break
        self._path = None

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def holder_lives(handle: int) -> bool | None:
    """Whether the process that a lock's open file names is alive; None if it ran on another node. Locks nothing."""
    holder = _holder(handle)
    return None if holder and holder["host"] != socket.gethostname() else _lives(holder)


def _lock(handle: int, folder: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise FolderInUseError(_in_use(folder, _holder(handle))) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        holder = _holder(handle)
        if _lives(holder):
            raise FolderInUseError(_in_use(folder, holder)) from None
        logger.warning("%s lies on a file system without locks: a second run there would not be noticed", folder)


def _is_at(handle: int, path: Path) -> bool:
    """Whether an open file is the one at a path."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except OSError as error:
        return error.errno not in GONE


def _gone(path: Path, handle: int) -> str:
    folder = path.parent
    try:
        now = Path(os.readlink(f"/proc/self/fd/{handle}"))  # Linux knows
    except OSError:
        now = path
    what = f"{folder} was moved or deleted"
    todo = f"move it back, or name its new place with --output, and add --resume; if it is deleted, start {folder} anew"
    if now.exists() and _is_at(handle, now) and now.parent != folder.absolute():
        what = f"{folder} was moved to {now.parent}"
        todo = f"move it back, or write --output {shlex.quote(str(now.parent))}, and add --resume"
    elif folder.is_dir():
        what = f"{path}, which keeps other runs out of the folder, was deleted, or the folder was replaced"
        todo = "see what is in the folder, and go on with --resume"
    return f"{what} while this run wrote there. The run has ended and written nothing there since: {todo}"


def _holder(handle: int) -> dict[str, Any]:
    """What the holder wrote; empty where it has not yet, or somebody else has written there."""
    try:
        found = json.loads(os.pread(handle, 4096, 0))
        return {"host": str(found["host"]), "pid": int(found["pid"]), "started": float(found["started"])}
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
        return {}


def _lives(holder: dict[str, Any]) -> bool:
    if not holder or holder["host"] != socket.gethostname():
        return False
    try:
        return bool(abs(psutil.Process(holder["pid"]).create_time() - holder["started"]) < 1.0)
    except (psutil.Error, ValueError, OverflowError):  # no process has that number
        return False


def _in_use(folder: Path, holder: dict[str, Any]) -> str:
    who = "another process"
    if holder:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder["started"]))
        who = f"process {holder['pid']} on {holder['host']}, started {since},"
    return f"{who} writes into {folder}: wait for it, stop it, or name another folder with --output"


def _forget_in_child() -> None:
    """A child that outlives its parent must not hold the lock."""
    while _open:
        os.close(_open.pop())


os.register_at_fork(after_in_child=_forget_in_child)
