"""Optimizer steps: how long they take, how much of it GaLore's matrix products are, and the bytes that ranks exchange.

One CPU process times every optimizer on the same weights and synthetic gradients, step by step in turns. Four
processes then train a small LLaMA at ZeRO stage 3, and what every rank sends is counted.
"""

from __future__ import annotations

import argparse
import gc
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import traffic
from benchmarks.contenders import BLOCKS, CONTENDERS, NotAvailableError
from benchmarks.flags import add_output, write_output
from benchmarks.gradients import Workload
from benchmarks.timing import Steps, Summary, take_turns
from megalr.flags import positive
from megalr.formatting import human_bytes, markdown_table
from megalr.memory.peak import peak_memory_bytes
from megalr.train.models import build_model, read_model_config

RANKS = {"60m": 128, "130m": 256, "350m": 256, "1b": 512, "7b": 1024}  # of the GaLore papers
STEPS = 200
# The published code's default. It gives every optimizer four refreshes in 200 steps; the one of a gap of 200 would be
# beyond the 99th percentile.
GAP = 50
DEAR = 2.0  # times AdamW's median, above which the products alone are pointed out
COLUMNS = (
    "optimizer",
    "median ms",
    "99th percentile",
    "maximum",
    "mean",
    "first step",
    "median / AdamW",
    "/ fused AdamW",
    "/ galore-torch",
    "99th / galore-torch",
)
YARDSTICKS = (("adamw", "median"), ("adamw-fused", "median"), ("galore-torch", "median"), ("galore-torch", "p99"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument(
        "--models", nargs="*", default=["60m", "350m"], help="names in launchers/models, or paths; none: no step times"
    )
    parser.add_argument("--steps", type=positive, default=STEPS, help=f"steps of each optimizer (default: {STEPS})")
    parser.add_argument("--gap", type=positive, default=GAP, help=f"updates between refreshes (default: {GAP})")
    parser.add_argument("--threads", type=positive, help="torch's threads (default: its own choice)")
    parser.add_argument(
        "--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), help="which optimizers (default: all)"
    )
    parser.add_argument(
        "--traffic",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="count what four processes exchange (default: yes)",
    )
    add_output(parser)


def run(arguments: argparse.Namespace, models: Path) -> None:
    """Measure, print Markdown, and write the raw numbers if asked.

    Args:
        arguments: of :func:`add_arguments`.
        models: the folder of the named shapes.
    """
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    raw: dict[str, Any] = {
        "torch": torch.__version__,
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "steps": arguments.steps,
        "gap": arguments.gap,
        "seconds": {},
    }
    for name in arguments.models:
        raw["seconds"][name] = time_model(name, models, arguments.contenders, arguments.steps, arguments.gap)
    if arguments.traffic:
        raw["traffic"] = traffic.measure()
        print(f"\n{traffic.report(raw['traffic'])}")
    write_output(arguments, raw)


def time_model(
    name: str, models: Path, contenders: Sequence[str], steps: int, gap: int
) -> dict[str, dict[str, list[float]]]:
    """Time all blocks of contenders on one shape, print a table for each, and return the seconds of every step."""
    config = read_model_config(name, models)
    rank = RANKS.get(Path(name).stem, config.hidden_size // 4)
    workload = Workload(build_model(config, seed=0))
    raw = {}
    for title, members in BLOCKS.items():
        chosen = [member for member in members if member in contenders]
        if set(chosen) <= {"adamw", "adamw-fused"} and title != next(iter(BLOCKS)):
            continue  # a yardstick with nothing to measure
        seconds, missing = _time_block(chosen, workload, rank, steps, gap)
        summaries = {member: Summary.of(taken) for member, taken in seconds.items()}
        threads = torch.get_num_threads()
        print(f"\n{Path(name).stem}, {title}: rank {rank}, gap {gap}, {steps} steps, fp32, {threads} threads\n")
        print(markdown_table(COLUMNS, rows(summaries, missing)), flush=True)
        if "products" in summaries:
            print(f"\n{share_of_products(summaries)}")
        raw[title] = seconds
    print(f"\npeak memory of the process: {human_bytes(peak_memory_bytes())}", flush=True)
    return raw


def rows(summaries: Mapping[str, Summary], missing: Mapping[str, str]) -> list[list[str]]:
    """The table's rows: times in milliseconds, then ratios to the yardsticks that took part."""
    lines = []
    for member, summary in summaries.items():
        times = (summary.median, summary.p99, summary.max, summary.mean, summary.first)
        ratios = [
            f"{getattr(summary, value) / getattr(summaries[yardstick], value):.2f}" if yardstick in summaries else "-"
            for yardstick, value in YARDSTICKS
        ]
        lines.append([CONTENDERS[member].title, *(f"{1e3 * seconds:.1f}" for seconds in times), *ratios])
    return lines + [[CONTENDERS[member].title, reason] for member, reason in missing.items()]


def share_of_products(summaries: Mapping[str, Summary]) -> str:
    """One sentence on GaLore's matrix products against whole GaLore steps and against AdamW's."""
    products = summaries["products"].median
    parts = []
    for member in ("galore-svd", "galore-power"):
        if member in summaries:
            parts.append(f"{products / summaries[member].median:.0%} of {CONTENDERS[member].title}")
    dear = []
    for member in ("adamw", "adamw-fused"):
        if member in summaries:
            ratio = products / summaries[member].median
            parts.append(f"{ratio:.2f} times {CONTENDERS[member].title}")
            dear += [CONTENDERS[member].title] if ratio > DEAR else []
    sentence = f"GaLore's matrix products alone take {1e3 * products:.1f} ms: {', '.join(parts)}."
    if dear:
        sentence += f" That is more than {DEAR:g} times {' and '.join(dear)} before anything else is computed."
    return sentence


def _time_block(
    members: Sequence[str], workload: Workload, rank: int, steps: int, gap: int
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Step times by contender, and of those that are not installed how to install them."""
    built: dict[str, Steps] = {}
    missing = {}
    for member in members:
        try:
            built[member] = CONTENDERS[member].build(workload, rank, gap)
        except NotAvailableError as error:
            missing[member] = str(error)

    def prepare(member: str, step: int) -> None:
        workload.refresh(step, own_copies=CONTENDERS[member].writes_gradients)

    seconds = take_turns(built, steps, prepare)
    built.clear()
    gc.collect()
    return seconds, missing
