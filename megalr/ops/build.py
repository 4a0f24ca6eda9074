"""Compile the ops of csrc/, once for a machine, and find what was compiled before.

A library is named by what it depends on: a hash of its sources, its flags and torch's version, and one of the compiler.
It is looked for beside this file (``MEGALR_BUILD_OPS=1 pip install .`` puts it there), then in the cache; else it is
compiled into the cache, by one process while the others wait.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import stat
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from megalr.ops import toolchain

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

_LONGEST_BUILD = 900.0  # seconds; a compiler, or a process that others wait for, is taken for stuck after that


class BuildError(RuntimeError):
    """There is no library and none could be compiled; the message says why, and ends with the compiler's output."""


@dataclass(frozen=True)
class Library:
    """A compiled library: where it is, and "prebuilt", "cache" or "compiled now"."""

    path: Path
    origin: str


def find(kind: str) -> Library | None:
    """The library that was compiled before from the sources as they are, if there is one.

    Args:
        kind: a key of :data:`LIBRARIES`.
    """
    # Any compiler's will do where somebody prebuilt it, or where there is none to compile again.
    anyone = sorted(PREBUILT.glob(f"{_stem(kind)}-*.so"))
    if anyone:
        return Library(anyone[0], "prebuilt")
    pattern = _name(kind) if _missing(kind) is None else f"{_stem(kind)}-*.so"
    for folder in _caches():
        found = sorted(folder.glob(pattern)) if _is_ours(folder) else []
        if found:
            return Library(found[0], "cache")
    return None


def build(kind: str, *, broken: Library | None = None) -> Library:
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
    path = _writable_cache() / _name(kind)
    failure = path.with_suffix(".failed")
    useless, old_failure = _written(broken.path) if broken else None, _written(failure)
    with _lock(path.with_suffix(".lock")):
        if _written(path) not in (None, useless):
            return Library(path, "cache")  # another process compiled it while this one waited
        if _written(failure) not in (None, old_failure):
            raise BuildError(failure.read_text(encoding="utf-8"))  # or failed: the others need not try in turn
        try:
            compile_library(kind, path)
        except BuildError as error:
            with contextlib.suppress(OSError):
                failure.write_text(str(error), encoding="utf-8")
            raise
    return Library(path, "compiled now")


def compile_library(kind: str, target: Path, *, verbose: bool = False) -> None:
    """Compile a library to ``target``, which appears whole or not at all.

    Args:
        kind: a key of :data:`LIBRARIES`.
        target: its folder exists.
        verbose: print the commands and what the compilers say (ptxas' registers and spills among it).

    Raises:
        BuildError: a compiler failed.
    """
    start = time.monotonic()
    logger.info("compiling the ops for %s tensors, once for this machine and torch (a minute)", kind)
    with tempfile.TemporaryDirectory(prefix="megalr-build-") as scratch:
        sources = _sources(kind)
        objects = [Path(scratch, f"{i}-{source.stem}.o") for i, source in enumerate(sources)]
        commands = [
            toolchain.compile_command(source, target, CSRC) for source, target in zip(sources, objects, strict=True)
        ]
        with ThreadPoolExecutor(_processors()) as pool:
            for command, output in zip(commands, pool.map(_run, commands), strict=True):
                if verbose:
                    print(" ".join(command), output, sep="\n", flush=True)
        linked = Path(scratch, target.name)
        _run(toolchain.link_command(kind, objects, linked))
        whole = target.with_name(f"{target.name}.{uuid.uuid4().hex}")
        try:
            shutil.copyfile(linked, whole)
            os.replace(whole, target)
        except OSError as error:
            raise BuildError(f"cannot write {target}: {error}") from error
        finally:
            whole.unlink(missing_ok=True)
    logger.info("compiled %s in %.0f s", target, time.monotonic() - start)


def prebuild() -> list[Path]:
    """Compile what can be compiled here into :data:`PREBUILT`, in place of what is there."""
    shutil.rmtree(PREBUILT, ignore_errors=True)
    PREBUILT.mkdir()
    kinds = [kind for kind in LIBRARIES if kind == "cpu" or _missing(kind) is None]
    for kind in kinds:
        missing = _missing(kind)
        if missing:
            raise BuildError(missing)
        compile_library(kind, PREBUILT / _name(kind))
    return sorted(PREBUILT.glob("*.so"))


def _missing(kind: str) -> str | None:
    """What a compilation lacks."""
    if toolchain.cxx() is None:
        return "no C++ compiler: install g++ (apt install g++), or write its path into CXX"
    if kind == "cuda":
        nvcc = toolchain.nvcc()
        if torch.version.cuda is None:
            return f"torch {torch.__version__} is a build without CUDA"
        if nvcc is None:
            return f"no nvcc: install the CUDA toolkit {torch.version.cuda}, or write its folder into CUDA_HOME"
        if f"release {torch.version.cuda.split('.')[0]}." not in nvcc.version:
            return f"{nvcc.path} is of another CUDA ({nvcc.version}) than torch ({torch.version.cuda}): set CUDA_HOME"
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
    digest = hashlib.sha256(repr([(one.version, one.flags) for one in compilers if one]).encode())
    return f"{_stem(kind)}-{digest.hexdigest()[:8]}.so"


def _caches() -> list[Path]:
    """Where libraries are looked for and, where it can be written to, put; the best first."""
    chosen = os.environ.get("MEGALR_OPS_CACHE")
    first = Path(chosen) if chosen else Path(os.path.expanduser("~"), ".cache", "megalr", "ops")
    return [first, Path(tempfile.gettempdir(), f"megalr-ops-{os.getuid()}")]


def _writable_cache() -> Path:
    reasons = []
    for folder in _caches():
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            reasons.append(f"{folder}: {error}")
            continue
        if _is_ours(folder):
            if reasons:
                logger.warning("the compiled ops are kept in %s, as there is no writing to %s", folder, reasons[0])
            return folder
        reasons.append(f"{folder}: others can write to it")
    raise BuildError(f"no folder for the compiled ops ({'; '.join(reasons)}): write one into MEGALR_OPS_CACHE")


def _is_ours(folder: Path) -> bool:
    """What is loaded runs as this user: nobody else may have put it there, as anybody can in /tmp."""
    try:
        state = folder.stat()
    except OSError:
        return False
    if folder.parent == Path(tempfile.gettempdir()):
        return state.st_uid == os.getuid() and not state.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return True


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Held by one process of this file system at a time.

    The kernel lets go of it when its holder ends, however it ends: a lock file that is left behind means nothing.
    """
    import fcntl

    with path.open("a") as file:
        end = time.monotonic() + _LONGEST_BUILD
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    logger.warning("another process has held %s for %.0f s: compiling beside it", path, _LONGEST_BUILD)
                    break
                time.sleep(0.1)
            except OSError:  # a file system without locks: each compiles, and the last to be ready is kept
                break
        yield


def _written(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.exists() else None


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=_LONGEST_BUILD, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{' '.join(command)}: {error}") from error
    if done.returncode:
        end = "\n".join(done.stdout.splitlines()[-20:])
        raise BuildError(f"{' '.join(command)} failed with exit code {done.returncode}:\n{end}")
    return done.stdout


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
