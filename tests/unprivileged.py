"""A block in which modes of files mean something to root as well."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

# Linux' capget(2) and capabilities(7): with these a process reads and enters whatever it likes.
_VERSION = 0x20080522
_OVERRIDE, _READ_SEARCH = 1, 2


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Data(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint32) for name in ("effective", "permitted", "inheritable"))


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """In this thread, and in those that it starts; whoever has no such privileges stays as he is."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, data = _Header(_VERSION, 0), (_Data * 2)()
    assert libc.capget(ctypes.byref(header), data) == 0
    before = data[0].effective
    data[0].effective &= ~(1 << _OVERRIDE | 1 << _READ_SEARCH)
    assert libc.capset(ctypes.byref(header), data) == 0
    try:
        yield
    finally:
        data[0].effective = before
        assert libc.capset(ctypes.byref(header), data) == 0
