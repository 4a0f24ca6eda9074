"""Compile the CUDA kernels for every architecture and print what ptxas says of them; no GPU is needed.

    python csrc/check_cuda.py           the kernels alone: nvcc, and any build of torch
    python csrc/check_cuda.py --link    then the whole library against a CUDA build of torch; it is imported

Ends with an error where a kernel spills registers, or where anything does not compile, link or import.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

CSRC = Path(__file__).parent
sys.path.insert(0, str(CSRC.parent))  # megalr need not be installed


class Kernel(NamedTuple):
    source: str
    name: str
    architecture: str
    registers: int
    stack: int  # bytes, as the two kinds of spills
    spill_stores: int
    spill_loads: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--link", action="store_true", help="build and import the whole library")
    arguments = parser.parse_args()
    kernels = compile_kernels()
    print_table(kernels)
    if arguments.link:
        link_and_import()
    spilling = [kernel for kernel in kernels if kernel.spill_stores or kernel.spill_loads]
    if spilling:
        sys.exit(f"{len(spilling)} kernels spill registers, the first of them {spilling[0]}")


def compile_kernels() -> list[Kernel]:
    """All of csrc/cuda/*.cu with the commands of a real build, as many at once as there are processors."""
    from megalr.ops import toolchain

    nvcc = toolchain.nvcc()
    if nvcc is None:
        sys.exit(
            "there is no nvcc: install the CUDA toolkit, and put nvcc on PATH or the toolkit's folder in CUDA_HOME"
        )
    print(f"{nvcc.version}\n{' '.join(nvcc.flags)}", flush=True)

    def compile_one(source: Path) -> list[Kernel]:
        begin = time.monotonic()
        said = run(*toolchain.compile_command(source, Path(folder, f"{source.stem}.o"), CSRC))
        print(f"  {source.name}: compiled in {time.monotonic() - begin:.0f} s", flush=True)
        return read_ptxas(source.name, said)

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(compile_one, sorted(CSRC.glob("cuda/*.cu")))
        return [kernel for kernels in found for kernel in kernels]


def read_ptxas(source: str, said: str) -> list[Kernel]:
    """One for each kernel and architecture in the output of ``-Xptxas -v``."""
    parts = said.split("Compiling entry function ")[1:]
    heads = [re.findall(r"'([^']+)'", part)[:2] for part in parts]
    if not parts or not all(len(head) == 2 for head in heads):
        sys.exit(f"{source}: ptxas names no kernel, or not as it used to:\n{said}")
    names = run("c++filt", *(mangled for mangled, _ in heads)).splitlines()  # of binutils, as g++'s assembler
    kernels = []
    for part, (_, architecture), name in zip(parts, heads, names, strict=True):
        sizes = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        registers = re.search(r"Used (\d+) registers", part)
        if not (sizes and registers):
            sys.exit(f"{source}: ptxas says something else than it used to:\n{part}")
        # "void megalr::cuda::(anonymous namespace)::update<float, float>(...)"
        short = re.match(r"\w+", name.partition("(anonymous namespace)::")[2])
        numbers = [int(n) for n in sizes.groups()]
        kernels.append(Kernel(source, short[0] if short else name, architecture, int(registers[1]), *numbers))
    return kernels


def print_table(kernels: list[Kernel]) -> None:
    """A kernel that is compiled for several storage types is one line."""
    groups = defaultdict(list)
    for kernel in kernels:
        groups[kernel.source, kernel.name, kernel.architecture].append(kernel)
    print(f"\n{'kernel':<34}{'for':>8}{'variants':>10}{'registers':>11}{'stack':>7}{'spilled bytes':>15}")
    for (source, name, architecture), group in groups.items():
        registers = sorted(kernel.registers for kernel in group)
        spread = f"{registers[0]}-{registers[-1]}" if registers[0] < registers[-1] else str(registers[0])
        spilled = sum(kernel.spill_stores + kernel.spill_loads for kernel in group)
        stack = max(kernel.stack for kernel in group)
        print(f"{f'{source} {name}':<34}{architecture:>8}{len(group):>10}{spread:>11}{stack:>7}{spilled:>15}")


def link_and_import() -> None:
    """As at first use. A link proves nothing, so the libraries are loaded and asked for their ops."""
    import torch

    from megalr.ops import build, library

    print(f"\ntorch {torch.__version__}, CUDA {torch.version.cuda}", flush=True)
    if torch.version.cuda is None:
        sys.exit("this torch is a build without CUDA: run `make cuda-check`, which installs another")
    with tempfile.TemporaryDirectory() as folder:
        for kind in build.LIBRARIES:
            begin = time.monotonic()
            torch.ops.load_library(str(build.compile_library(kind, Path(folder))))
            print(f"  the library for {kind} tensors: built in {time.monotonic() - begin:.0f} s, and imported")
    for name in library.SCHEMAS:
        for key in ("CPU", "CUDA"):
            if not torch._C._dispatch_has_kernel_for_dispatch_key(f"megalr::{name}", key):
                sys.exit(f"megalr::{name} has no kernel for {key} in what was built")
    print(f"  compiled for CPU and CUDA tensors: {', '.join(library.SCHEMAS)}")


def run(*command: str) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout}")
    return done.stdout


if __name__ == "__main__":
    main()
