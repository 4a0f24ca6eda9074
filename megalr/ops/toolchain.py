"""The compilers that csrc/ is compiled with, and their flags. Imports nothing of megalr: setup.py runs it too."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch

# -fno-math-errno lets a square root be an instruction, -fno-trapping-math a comparison be a mask. Neither changes a
# result; nothing that does (-ffast-math) is here.
CXX_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-DNDEBUG"]
NVCC_FLAGS = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC", "-Xptxas", "-v", "--expt-relaxed-constexpr"]
ARCHITECTURES = ("80", "90", "100")  # those that nvcc knows


@dataclass(frozen=True)
class Compiler:
    """A compiler that was found.

    Attributes:
        command: how to call it: its path, and more words where ``CXX`` has them, as in "ccache g++".
        version: what it says of itself, with the flags that only this compiler gets.
        flags: those flags.
    """

    command: tuple[str, ...]
    version: str
    flags: tuple[str, ...] = ()


@functools.cache
def cxx() -> Compiler | None:
    """$CXX where that is set, else the first of g++, c++, clang++ that runs; None if it does not run."""
    wish = os.environ.get("CXX")
    for words in [_words(wish)] if wish else [["g++"], ["c++"], ["clang++"]]:
        path = shutil.which(words[0]) if words else None
        version = _output([path, *words[1:], "--version"]) if path else None
        if path and version:
            # The OpenMP runtime has to be torch's, for one pool of threads and torch.set_num_threads: it is compiled
            # for here and not linked. clang calls another runtime than torch's libgomp, so its loops run on one thread.
            flags = ("-fopenmp-simd",) if "clang" in version else ("-fopenmp",)
            return Compiler((path, *words[1:]), version.splitlines()[0], flags)
    return None


@functools.cache
def nvcc() -> Compiler | None:
    """nvcc of the toolkit in $CUDA_HOME, else of the one on the PATH, else of /usr/local/cuda."""
    found = shutil.which("nvcc")
    on_path = Path(found).resolve().parents[1] if found else None
    for home in (os.environ.get("CUDA_HOME"), on_path, "/usr/local/cuda"):
        # nvcc on the PATH may be a script in /usr/local/bin: a toolkit is where the headers are too.
        path = Path(home, "bin", "nvcc") if home else None
        if path and path.is_file() and Path(path.parents[1], "include", "cuda_runtime.h").is_file():
            version = _output([str(path), "--version"])
            known = _output([str(path), "--list-gpu-arch"]) or ""
            if version:
                chosen = [arch for arch in ARCHITECTURES if f"compute_{arch}" in known.split()]
                flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in chosen]
                if chosen:  # and, for GPUs to come, code that the driver compiles
                    flags.append(f"-gencode=arch=compute_{chosen[-1]},code=compute_{chosen[-1]}")
                release = next(line for line in version.splitlines() if "release" in line)
                return Compiler((str(path),), release, tuple(flags))
    return None


def compile_command(source: Path, target: Path, csrc: Path) -> list[str]:
    """The command that makes an object file of a source of csrc/; the compiler must be there."""
    if source.suffix == ".cu":  # without torch's headers, which nvcc takes minutes for
        compiler = nvcc()
        assert compiler is not None
        includes = [csrc, *nvidia_folders("include")]
        return [
            *compiler.command,
            *NVCC_FLAGS,
            *compiler.flags,
            *_each("-I", includes),
            "-c",
            str(source),
            "-o",
            str(target),
        ]
    compiler = cxx()
    assert compiler is not None
    torch_include = Path(torch.__file__).parent / "include"
    includes = [csrc, torch_include, torch_include / "torch/csrc/api/include"]
    if "cuda" in source.parts:
        includes += _toolkit("include")
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
    flags = [*CXX_FLAGS, *compiler.flags, abi, *_each("-I", [csrc]), *_each("-isystem", includes[1:])]
    return [*compiler.command, *flags, "-c", str(source), "-o", str(target)]


def link_command(kind: str, objects: list[Path], target: Path) -> list[str]:
    """The command that makes the library of a kind of device ("cpu" or "cuda") of its object files."""
    compiler = cxx()
    assert compiler is not None
    libraries = ["-lc10", "-ltorch_cpu", "-ltorch"]
    folders = [Path(torch.__file__).parent / "lib"]
    if kind == "cuda":
        libraries += ["-lc10_cuda", "-ltorch_cuda", "-lcudart"]
        folders += _toolkit("lib64")
    undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
    return [
        *compiler.command,
        "-shared",
        *map(str, objects),
        *_each("-L", folders),
        *libraries,
        *undefined,
        "-o",
        str(target),
    ]


def nvidia_folders(name: str) -> list[Path]:
    """The folders of the pip packages nvidia-cublas, nvidia-cusolver and so on: ``nvidia/*/<name>``."""
    return sorted(Path(sysconfig.get_path("purelib"), "nvidia").glob(f"*/{name}"))


def platform_key() -> str:
    """What a library depends on besides its sources, its flags and its compiler."""
    cuda = torch.version.cuda or "no CUDA"
    return f"torch {torch.__version__}, {cuda}, {platform.machine()}, {' '.join(platform.libc_ver())}"


def _toolkit(name: str) -> list[Path]:
    compiler = nvcc()
    assert compiler is not None
    return [Path(compiler.command[0]).parents[1] / name]


def _words(command: str) -> list[str]:
    """A path, which may have spaces in it, or words as a shell splits them."""
    if shutil.which(command):
        return [command]
    with contextlib.suppress(ValueError):  # a quotation mark is missing
        return shlex.split(command)
    return [command]


def _each(flag: str, paths: list[Path]) -> list[str]:
    return [f"{flag}{path}" for path in paths]


def _output(command: list[str]) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
