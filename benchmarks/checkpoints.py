"""Checkpoints against DeepSpeed's of the same state: how long a save stops the training, and bytes on the disk.

Each save is timed where a training would wait for it, on live processes, in turns; the disk is that of --folder.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.flags import add_output, add_ranks, write_output
from benchmarks.ranks import from_ranks
from benchmarks.timing import Summary
from megalr.errors import UserError
from megalr.formatting import markdown_table
from megalr.train.models import read_model_config

DEEPSPEED, AT_ONCE, BESIDE = "DeepSpeed", "megalr", "megalr, asynchronous"
METHODS: dict[str, dict[str, Any]] = {
    "AdamW": {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}},
    "low-rank": {
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "megalr": {"parametrization": {"type": "low_rank", "rank": 128}},
    },
    "GaLore": {"optimizer": {"type": "GaLoreAdamW", "params": {"lr": 1e-3, "rank": 128}}},
}
TIMEOUT = 3600.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, help="default: all")
    add_ranks(parser, "data-parallel")
    parser.add_argument("--stage", type=int, default=2, choices=range(4), help="ZeRO stage (default: 2)")
    parser.add_argument("--saves", type=int, default=5, help="timed saves of each kind (default: 5)")
    parser.add_argument("--folder", type=Path, help="where to write, an existing folder (default: a temporary one)")
    add_output(parser)


def run(arguments: argparse.Namespace, models: Path) -> None:
    """Measure, print Markdown, and write the raw numbers if asked.

    Args:
        arguments: of :func:`add_arguments`.
        models: the folder of the named shapes.
    """
    if arguments.processes < 1 or arguments.saves < 1:
        raise UserError("--processes and --saves have to be at least 1")
    shape = read_model_config(arguments.model, models).to_dict()
    found = {}
    for method in arguments.methods:
        with tempfile.TemporaryDirectory(prefix="checkpoints-", dir=arguments.folder) as folder:
            request = {
                "shape": shape,
                "config": METHODS[method],
                "stage": arguments.stage,
                "saves": arguments.saves,
                "folder": folder,
            }
            ranks = from_ranks("benchmarks.checkpoints_rank", arguments.processes, TIMEOUT, [json.dumps(request)])
        found[method] = slowest(ranks)
    print(report(found, arguments.model, arguments.processes, arguments.stage))
    write_output(arguments, found)


def slowest(ranks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Seconds of the slowest rank for each save; bytes are the same for all."""
    seconds = {
        kind: [max(each) for each in zip(*(rank["seconds"][kind] for rank in ranks), strict=True)]
        for kind in ranks[0]["seconds"]
    }
    return {"seconds": seconds, "bytes": ranks[0]["bytes"]}


def report(found: Mapping[str, Mapping[str, Any]], model: str, processes: int, stage: int) -> str:
    """A Markdown table; the first save of each kind is left out."""
    columns = ("method", "writer", "training waits, s", "/ DeepSpeed", "bytes", "/ DeepSpeed")
    lines = []
    for method, numbers in found.items():
        base = Summary.of(numbers["seconds"][DEEPSPEED][1:] or numbers["seconds"][DEEPSPEED]).median
        for kind, seconds in numbers["seconds"].items():
            median, size = Summary.of(seconds[1:] or seconds).median, numbers["bytes"][kind]
            ratio = f"{median / base:.2f}" + (" (aim 0.25)" if kind == BESIDE else "")
            share = f"{size / numbers['bytes'][DEEPSPEED]:.2f}" + (" (aim 1)" if kind != DEEPSPEED else "")
            lines.append([method, kind, f"{median:.3f}", ratio, f"{size:,}", share])
    head = f"A save of {model}, ZeRO stage {stage}, {processes} processes, fp32\n\n"
    return head + markdown_table(columns, lines) + "\n"
