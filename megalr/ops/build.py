"""Compile the ops of csrc/, once for a machine, and find what was compiled before.

A library is named by what it depends on, a hash of its sources, its flags and torch's version and one of the compiler,
and by a hash of itself: half of a file, as a crash of the machine leaves it, ends a process that loads it by SIGBUS. It
is looked for beside this file (``MEGALR_BUILD_OPS=1 pip install .`` puts it there), then in the cache; else it is
compiled into the cache, by one process while the others wait. A cache that others could change is none.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from megalr.disk import sync
from megalr.ops import toolchain
from megalr.ops.trust import distrust

logger = logging.getLogger(__name__)

# What each kind of device's library is made of. What ATen computes, on any device, is in the CPU's.
LIBRARIES = {
    "cpu": ("cpu/adam.cpp", "cpu/binding.cpp", "refactorize.cpp"),
    "cuda": (
        "cuda/low_rank_adam.cu",
        "cuda/momentum_reset.cu",
        "cuda/projected_adam.cu",
        "cuda/stable_spam_adam.cu",
        "cuda/binding.cpp",
    ),
}

PREBUILT = Path(__file__).parent / "prebuilt"
_PACKAGED = Path(__file__).parents[1] / "csrc"  # in an installed package; in a checkout csrc/ is beside megalr/
CSRC = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parents[2] / "csrc"

_SCRATCH = ".build-"  # follows a library's name in that of the folder where it is compiled
_LONGEST_BUILD = 900.0  # seconds; a compiler, or a process that others wait for, is taken for stuck after that


class BuildError(RuntimeError):
    """There is no library and none could be compiled; the message says why, and ends with the compiler's output."""


@dataclass(frozen=True)
class Library:
    """A compiled library: where it is, and "prebuilt", "cache" or "compiled now"."""

    path: Path
    origin: str


def find(kind: str) -> list[Library]:
    """The libraries that were compiled before from the sources as they are, the best first.

    Args:
        kind: a key of :data:`LIBRARIES`.
    """
    # Any compiler's will do where somebody prebuilt it, or where there is none to compile again.
    found = [Library(path, "prebuilt") for path in _whole(PREBUILT, f"{_stem(kind)}-*")]
    name = _name(kind) if _missing(kind) is None else f"{_stem(kind)}-*"
    for folder in _caches():
        found += [Library(path, "cache") for path in _trusted(folder, name)]
    return found


def build(kind: str, *, broken: Sequence[Library] = ()) -> Library:
    """Compile into the cache, or wait until another process has.

    Args:
        kind: a key of :data:`LIBRARIES`.
        broken: what was found, and would not load.

    Raises:
        BuildError: there is no compiler, or it failed.
    """
    missing = _missing(kind)
    if missing:
        raise BuildError(missing)
    folder, name = _writable_cache(), _name(kind)
    failure = folder / f"{name}.failed"
    if os.environ.get("RANK", "0") == "0":  # which compiles them, or waits for the rank that does
        logger.info("compiling the ops for %s tensors, once, into %s (a minute)", kind, folder)
    useless, old_failure = [(one.path, _written(one.path)) for one in broken], _written(failure)
    with _lock(folder / f"{name}.lock") as locked:
        for path in _trusted(folder, name):
            if (path, _written(path)) not in useless:
                return Library(path, "cache")  # another process compiled it while this one waited
        if _written(failure) not in (None, old_failure):
            raise BuildError(failure.read_text(encoding="utf-8"))  # or failed: the others need not try in turn
        if locked:
            _remove(folder.glob(f"{name}{_SCRATCH}*"))  # of a build that was killed
        try:
            path = compile_library(kind, folder)
        except BuildError as error:
            with contextlib.suppress(OSError):
                failure.write_text(str(error), encoding="utf-8")
            raise
        if locked:
            _remove(old for old in folder.glob(f"{name}-*.so") if old != path)
    return Library(path, "compiled now")


def compile_library(kind: str, folder: Path) -> Path:
    """Compile a library into a folder, where it appears whole or not at all.

    Args:
        kind: a key of :data:`LIBRARIES`.
        folder: exists.

    Returns:
        Where it is.

    Raises:
        BuildError: a compiler failed.
    """
    start, name = time.monotonic(), _name(kind)
    with tempfile.TemporaryDirectory(prefix=f"{name}{_SCRATCH}", dir=folder) as scratch:
        sources = _sources(kind)
        objects = [Path(scratch, f"{i}-{source.stem}.o") for i, source in enumerate(sources)]
        commands = [
            toolchain.compile_command(source, target, CSRC) for source, target in zip(sources, objects, strict=True)
        ]
        with ThreadPoolExecutor(_processors()) as pool:
            list(pool.map(lambda command: _run(command, scratch), commands))
        linked = Path(scratch, f"{name}.so")
        _run(toolchain.link_command(kind, objects, linked), scratch)
        path = folder / f"{name}-{_hash(linked)}.so"
        try:
            # A file system may remember a new name before the content.
            linked.chmod(0o644)  # whatever the umask: a library that others may write to is not loaded
            sync(linked)
            os.replace(linked, path)
            sync(folder)
        except OSError as error:
            raise BuildError(f"cannot write {path}: {error}") from error
    logger.info("compiled %s in %.0f s", path, time.monotonic() - start)
    return path


def prebuild() -> list[Path]:
    """Compile what can be compiled here into :data:`PREBUILT`, in place of what is there."""
    shutil.rmtree(PREBUILT, ignore_errors=True)
    PREBUILT.mkdir()
    if missing := _missing("cpu"):
        raise BuildError(missing)
    return [compile_library(kind, PREBUILT) for kind in LIBRARIES if _missing(kind) is None]


def _missing(kind: str) -> str | None:
    """What a compilation lacks."""
    if toolchain.cxx() is None:
        if wish := os.environ.get("CXX"):
            return f"CXX={wish} does not run: write a C++ compiler that does, as in CXX=g++, or unset it"
        return "no C++ compiler: install g++ (apt install g++), or write its path into CXX"
    if kind == "cuda":
        nvcc = toolchain.nvcc()
        if torch.version.cuda is None:
            return f"torch {torch.__version__} is a build without CUDA"
        if nvcc is None:
            return f"no nvcc: install the CUDA toolkit {torch.version.cuda}, or write its folder into CUDA_HOME"
        if f"release {torch.version.cuda.split('.')[0]}." not in nvcc.version:
            of_torch = f"torch ({torch.version.cuda})"
            return f"{nvcc.command[0]} is of another CUDA ({nvcc.version}) than {of_torch}: set CUDA_HOME"
    absent = [source.name for source in _sources(kind) if not source.is_file()]
    return f"{CSRC} lacks {', '.join(absent)}" if absent else None


def _sources(kind: str) -> list[Path]:
    return [CSRC / name for name in LIBRARIES[kind]]


def _stem(kind: str) -> str:
    """The part of the name that does not depend on the compiler."""
    parts = [toolchain.platform_key(), *toolchain.CXX_FLAGS, *(toolchain.NVCC_FLAGS if kind == "cuda" else [])]
    headers = [path for path in CSRC.rglob("*") if path.suffix in {".h", ".cuh"} and "emulation" not in path.parts]
    digest = hashlib.sha256()
    for path in sorted([*_sources(kind), *headers]):
        parts += [path.relative_to(CSRC).as_posix(), path.read_text(encoding="utf-8")]
    for part in parts:
        digest.update(part.encode() + b"\0")
    return f"megalr_{kind}-{digest.hexdigest()[:16]}"


def _name(kind: str) -> str:
    compilers = [toolchain.cxx(), *([toolchain.nvcc()] if kind == "cuda" else [])]
    known = [(one.version, one.flags, one.command[1:]) for one in compilers if one]
    return f"{_stem(kind)}-{hashlib.sha256(repr(known).encode()).hexdigest()[:8]}"


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _whole(folder: Path, name: str) -> list[Path]:
    """The libraries of a name in a folder whose content is what was once compiled."""
    found = []
    for path in sorted(folder.glob(f"{name}-*.so")):
        with contextlib.suppress(OSError):
            if path.stem.endswith(f"-{_hash(path)}"):
                found.append(path)
    return found


def _trusted(folder: Path, name: str) -> list[Path]:
    """Those of them that nobody else can have put there or changed."""
    return [path for path in _whole(folder, name) if not distrust(path)] if not distrust(folder) else []


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _caches() -> list[Path]:
    """Where libraries are looked for and, where it can be written to, put; the best first."""
    chosen = os.environ.get("MEGALR_OPS_CACHE")
    first = Path(chosen) if chosen else Path(os.path.expanduser("~"), ".cache", "megalr", "ops")
    return [first, Path(tempfile.gettempdir(), f"megalr-ops-{os.getuid()}")]


def _writable_cache() -> Path:
    reasons = []
    for folder in _caches():
        try:
            for each in reversed([each for each in (folder, *folder.parents) if not each.exists()]):
                each.mkdir(mode=0o700, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            reasons.append(f"there is no writing to {folder}: {error}")
            continue
        if why := distrust(folder):
            reasons.append(f"{folder} is not to be trusted: {why}")
            continue
        if reasons:
            logger.warning("the compiled ops are kept in %s, as %s", folder, reasons[0])
        return folder
    raise BuildError(f"no folder for the compiled ops ({'; '.join(reasons)}): write one into MEGALR_OPS_CACHE")


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Held by one process of this file system at a time; false where it could not be had.

    The kernel lets go of it when its holder ends, however it ends: a lock file that is left behind means nothing.
    """
    import fcntl

    with path.open("a") as file:
        end, locked = time.monotonic() + _LONGEST_BUILD, False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                locked = True
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    logger.warning("another process has held %s for %.0f s: compiling beside it", path, _LONGEST_BUILD)
                    break
                time.sleep(0.1)
            except OSError:  # a file system without locks: each compiles, and the last to be ready is kept
                break
        yield locked


def _written(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.exists() else None


def _run(command: list[str], scratch: str) -> None:
    try:
        done = subprocess.run(
            command,
            env=os.environ | {"TMPDIR": scratch},  # a compiler that is killed leaves its files there
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_LONGEST_BUILD,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{' '.join(command)}: {error}") from error
    if done.returncode:
        end = "\n".join(done.stdout.splitlines()[-20:])
        raise BuildError(f"{' '.join(command)} failed with exit code {done.returncode}:\n{end}")


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
