"""Files of a folder that anybody may have written: read in bounded time and memory, and only if they lie in it."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

DEEPEST = 100  # objects and lists inside each other


def open_inside(folder: Path, name: str) -> BinaryIO:
    """Open a regular file of a folder to read; a pipe or a device, for which reading would wait, is refused.

    Args:
        folder: may be a link itself.
        name: of a file in it, without a path; a link is followed if it stays in the folder.

    Raises:
        OSError: it is not there, is no regular file, or lies elsewhere.
    """
    path = folder / name
    if path.is_symlink() and path.exists() and path.resolve().parent != folder.resolve():
        raise OSError(f"it is a link to {path.resolve()}, outside of the folder: put the file itself there")
    _refuse_special(os.stat(path))  # before it is opened: that alone has effects on some devices
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _refuse_special(os.fstat(handle))
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def read_inside(folder: Path, name: str, limit: int) -> bytes:
    """All of a file of a folder, if it has no more than so many bytes; see :func:`open_inside`.

    Raises:
        OSError: it cannot be read.
        ValueError: it is larger.
    """
    with open_inside(folder, name) as file:
        content = file.read(limit + 1) if os.fstat(file.fileno()).st_size <= limit else None
    if content is None or len(content) > limit:
        raise ValueError(f"it has more than the {limit:,} bytes that it may have")
    return content


def parse(text: bytes) -> Any:
    """What JSON says; of any bytes.

    Raises:
        ValueError: it is not JSON, or has a key twice.
    """
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=_once)
    except RecursionError:
        raise ValueError("its brackets lie too deep inside each other") from None


def check_depth(value: Any) -> None:
    """Refuse what later steps, such as a pickle for other processes, would go too deep into.

    Raises:
        ValueError: objects and lists lie more than :data:`DEEPEST` deep.
    """
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(DEEPEST + 1):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise ValueError(f"its brackets lie more than {DEEPEST} deep inside each other")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise ValueError(f"it has {json.dumps(twice)[:60]} twice in one object")
    return found


def _refuse_special(state: os.stat_result) -> None:
    if stat.S_ISDIR(state.st_mode):
        raise IsADirectoryError("it is a folder")
    if not stat.S_ISREG(state.st_mode):
        raise OSError("it is a pipe, a socket or a device, and no file")
