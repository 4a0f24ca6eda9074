"""What a bug report needs: ``python -m megalr.report`` prints which op runs from where, and the versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

import torch

import megalr
from megalr.ops import apex, build, library, toolchain
from megalr.version import __version__

_PACKAGES = ("torch", "deepspeed", "transformers", "accelerate", "numpy")


def main() -> None:
    """Load what can be loaded (compiled now if it never was), and print the report."""
    kernels = {kind: _kernels(kind) for kind in build.LIBRARIES}
    print(f"{'op':<20}" + "".join(f"{f'{kind} tensors':<18}" for kind in kernels))
    for op in library.SCHEMAS:
        print(f"{op:<20}" + "".join(f"{library.runs_from(op, kind):<18}" for kind in kernels))
    print("-" * 56)
    for kind, one in kernels.items():
        lines = one.why.splitlines() or [""]
        print(f"{f'{kind} library':<20}{f'{one.library} ({one.why})' if one.library else f'none: {lines[0]}'}")
        for line in [] if one.library else lines[1:]:
            print(f"{'':<20}{line}")
    for name, value in versions().items():
        print(f"{name:<20}{value}")


def versions() -> dict[str, str]:
    """Name and value of everything that may matter."""
    cxx, nvcc = toolchain.cxx(), toolchain.nvcc()
    threads = f"{torch.get_num_threads()} of {os.cpu_count()} processors, {torch.backends.cpu.get_cpu_capability()}"
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "MEGALR_OPS": os.environ.get("MEGALR_OPS", "auto"),
        "C++ compiler": f"{' '.join(cxx.command)} ({cxx.version})" if cxx else _no_compiler(),
        "nvcc": f"{' '.join(nvcc.command)} ({nvcc.version})" if nvcc else "none",
        "megalr": f"{__version__} in {Path(megalr.__file__).parent}",
        "python": f"{platform.python_version()} on {platform.platform()}",
        **{name: _version(name) for name in _PACKAGES},
        "CUDA of torch": torch.version.cuda or "none",
        "apex (amp_C)": "imports" if apex.kernels() else "does not import",
        "GPUs": ", ".join(gpus) or "none",
        "threads": threads,
    }


def _kernels(kind: str) -> library.Kernels:
    if kind == "cuda" and not torch.cuda.is_available():
        return library.Kernels(None, "there is no GPU" if torch.version.cuda else "this torch is built without CUDA")
    try:
        return library.load(kind)
    except (build.BuildError, OSError) as error:  # MEGALR_OPS=compiled: say so and go on
        return library.Kernels(None, str(error))


def _no_compiler() -> str:
    return f"none: CXX={os.environ['CXX']} does not run" if os.environ.get("CXX") else "none"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    main()
