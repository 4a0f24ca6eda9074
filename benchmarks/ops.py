"""Compiled ops: beside torch's calls for the same, and what a refactorization adds to a training step.

Every contender of a table is timed in turns with the others, on the same data, for each number of threads.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks import ops_adam, ops_refactorize, ops_share
from benchmarks.flags import add_output, write_output
from megalr.errors import UserError
from megalr.flags import positive
from megalr.ops import library

PARTS = {"refactorize": ops_refactorize, "adam": ops_adam, "share": ops_share}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to time (default: all)")
    parser.add_argument("--threads", nargs="+", type=positive, default=[1, 2], help="torch's threads (default: 1 2)")
    parser.add_argument("--steps", type=positive, default=50, help="of each element-wise op (default: 50)")
    parser.add_argument(
        "--layers", type=positive, default=24, help="of the 1B shape, to refactorize (default: 24, all of it)"
    )
    add_output(parser)


def run(arguments: argparse.Namespace, models: Path) -> None:
    """Measure, print Markdown, and write the raw numbers if asked.

    Args:
        arguments: of :func:`add_arguments`.
        models: the folder of the named shapes.

    Raises:
        UserError: the compiled ops cannot be had here.
    """
    if (kernels := library.load("cpu")).library is None:
        raise UserError(f"there are no compiled ops to be timed: {kernels.why}")
    raw: dict[str, Any] = {"torch": torch.__version__, "machine": platform.processor() or platform.machine()}
    before = torch.get_num_threads()
    try:
        for name in arguments.parts:
            for threads in arguments.threads:
                torch.set_num_threads(threads)
                seconds: Mapping[str, Any] = PARTS[name].measure(arguments, models)
                raw[f"{name}, {threads} threads"] = seconds
                print(f"\n{PARTS[name].TITLE}, {threads} thread{'s' if threads > 1 else ''}\n")
                print(PARTS[name].report(seconds), flush=True)
    finally:
        torch.set_num_threads(before)
    write_output(arguments, raw)
