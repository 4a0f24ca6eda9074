"""Flags that several benchmarks have, and what they do."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from megalr.flags import positive


def add_ranks(parser: argparse.ArgumentParser, kind: str, shape: str = "shape (default: 60m)") -> None:
    """``--model`` and ``--processes``, for a benchmark that starts ranks of a kind, e.g. "data-parallel"."""
    parser.add_argument("--model", default="60m", help=shape)
    parser.add_argument("--processes", type=positive, default=2, help=f"{kind} ranks (default: 2)")


def add_output(parser: argparse.ArgumentParser) -> None:
    """``--output``, see :func:`write_output`."""
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write the raw numbers there")


def write_output(arguments: argparse.Namespace, raw: Any) -> None:
    """Write the raw numbers, if ``--output`` says where."""
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")
