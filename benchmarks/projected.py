"""Projected layers against full-rank AdamW and the GaLore rule: bytes held and sent, activations, memory, step times.

Two parts. Counts: what a rank holds and sends at ZeRO stage 2, by a formula that is first held against the bytes that
four training processes send; what autograd saves; the peak memory of fresh processes. Times: whole training steps
without DeepSpeed, of all methods in turns in one process.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import projected_traffic
from benchmarks.flags import add_output, write_output
from benchmarks.projected_counts import Sent, groups_of, held_bytes, mean_sent, saved_activations
from benchmarks.projected_methods import COUNTED, PROJECTED, PROJECTOR, TITLES
from benchmarks.projected_training import (
    AGAINST_ADAMW,
    AGAINST_RULE,
    GAP,
    STEADY,
    TIME_COLUMNS,
    peak_memory,
    time_methods,
    time_rows,
)
from benchmarks.timing import Summary
from benchmarks.traffic import WORLD_SIZE
from megalr.flags import positive
from megalr.formatting import human_bytes, markdown_table
from megalr.memory.formulas import RankBytes
from megalr.train.models import read_model_config

SENT_AIM = 0.27  # of full rank's, for the matrices alone
STEPS, WARM_UP = 40, 1
SCOPES = {True: "matrices", False: "whole model"}
HELD_COLUMNS = ("method", "gradients", "moments, rule's bases", "masters", "weights, layers' bases", "together")
SENT_COLUMNS = ("method", "reduced", "gathered", "matrices moved", "refreshes", "together", "/ full rank")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    switch = argparse.BooleanOptionalAction
    parser.add_argument("--counts", action=switch, default=True, help="the first part (default: yes)")
    parser.add_argument("--time", action=switch, default=True, help="the second part (default: yes)")
    parser.add_argument("--models", nargs="+", default=["60m", "350m", "1b"], help="shapes of the counts")
    parser.add_argument(
        "--verify", action=switch, default=True, help="count what four processes send, a minute or more (default: yes)"
    )
    parser.add_argument(
        "--peak", nargs="*", default=["60m"], metavar="MODEL", help="shapes that fresh processes really train"
    )
    parser.add_argument("--model", default="60m", help="shape of the times (default: 60m)")
    parser.add_argument("--methods", nargs="+", choices=TITLES, default=list(TITLES), help="that are timed")
    parser.add_argument("--steps", type=positive, default=STEPS, help=f"timed steps of each method (default: {STEPS})")
    parser.add_argument("--threads", type=positive, default=1, help="torch's threads (default: 1)")
    parser.add_argument("--sequences", type=positive, default=4, help="of a step's tokens (default: 4)")
    parser.add_argument("--length", type=positive, default=256, help="of each sequence (default: 256)")
    parser.add_argument("--gap", type=positive, default=GAP, help=f"updates between refreshes (default: {GAP})")
    add_output(parser)


def run(arguments: argparse.Namespace, models: Path) -> None:
    """Measure, print Markdown, and write the raw numbers if asked.

    Args:
        arguments: of :func:`add_arguments`.
        models: the folder of the named shapes.
    """
    torch.set_num_threads(arguments.threads)
    raw: dict[str, Any] = {
        "torch": torch.__version__,
        "machine": f"{platform.processor() or platform.machine()}, {arguments.threads} threads",
        "tokens": [arguments.sequences, arguments.length],
        "gap": arguments.gap,
    }
    if arguments.counts:
        raw["counts"] = _counts(arguments, models)
    if arguments.time:
        raw["seconds"] = _times(arguments, models)
    write_output(arguments, raw)


def held_rows(held: Mapping[tuple[str, bool], RankBytes]) -> list[list[str]]:
    """The table's rows, by method and whether the matrices alone are meant."""
    return [
        [_title(method, alone)]
        + [human_bytes(part) for part in (b.gradients, b.optimizer_state, b.masters, b.weights, b.total)]
        for (method, alone), b in held.items()
    ]


def sent_rows(sent: Mapping[tuple[str, bool], Sent]) -> list[list[str]]:
    """The table's rows, by method and whether the matrices alone are meant; AdamW's are what others are divided by."""
    return [
        [_title(method, alone)]
        + [human_bytes(round(part)) for part in (s.reduced, s.gathered, s.moved, s.refreshes, s.total)]
        + [f"{s.total / sent['adamw', alone].total:.3f}"]
        for (method, alone), s in sent.items()
    ]


def verdict(name: str, ratios: Mapping[str, float], aim: float) -> str:
    """One sentence: what was aimed at, and what each method has."""
    found = ", ".join(f"{TITLES[m]} {r:.3f} ({'met' if r <= aim else 'missed'})" for m, r in ratios.items())
    return f"{name}, aim at most {aim:g}: {found}."


def _title(method: str, alone: bool) -> str:
    return f"{TITLES[method]}; {SCOPES[alone]}"


def _counts(arguments: argparse.Namespace, models: Path) -> dict[str, Any]:
    raw: dict[str, Any] = {"held": {}, "sent": {}, "activations": {}, "peak": {}}
    if arguments.verify:
        raw["counted"] = projected_traffic.measure()
        print(f"\n{projected_traffic.check(raw['counted'])}")
    for name in arguments.models:
        config = read_model_config(name, models)
        held: dict[tuple[str, bool], RankBytes] = {}
        sent: dict[tuple[str, bool], Sent] = {}
        for alone in SCOPES:
            for method in COUNTED:
                groups = groups_of(config, method, config.hidden_size // 4, matrices_alone=alone)
                held[method, alone] = held_bytes(groups, WORLD_SIZE)
                sent[method, alone] = mean_sent(groups, WORLD_SIZE, arguments.gap)
        setting = f"ZeRO stage 2, {WORLD_SIZE} ranks, fp32, r = {config.hidden_size // 4}"
        print(f"\n{Path(name).stem}: bytes that the fullest rank holds between two micro-batches, {setting}\n")
        print(markdown_table(HELD_COLUMNS, held_rows(held)))
        print(
            f"\n{Path(name).stem}: bytes that a rank sends per step, by the formula, mean over ranks, {setting}, "
            f'projector "{PROJECTOR}", refreshes spread over a gap of {arguments.gap}\n'
        )
        print(markdown_table(SENT_COLUMNS, sent_rows(sent)))
        ratios = {m: sent[m, True].total / sent["adamw", True].total for m in PROJECTED if m in COUNTED}
        print(f"\n{verdict('Traffic of the matrices / full rank', ratios, SENT_AIM)}", flush=True)
        raw["held"][name] = {_title(*key): vars(value) for key, value in held.items()}
        raw["sent"][name] = {_title(*key): vars(value) for key, value in sent.items()}
    raw["activations"] = _activations(arguments, models)
    raw["peak"] = {name: _peak(name, arguments, models) for name in arguments.peak}
    return raw


def _activations(arguments: argparse.Namespace, models: Path) -> dict[str, dict[str, int]]:
    raw: dict[str, dict[str, int]] = {}
    for name in arguments.models:
        config = read_model_config(name, models)
        raw[name] = {
            method: saved_activations(config, method, config.hidden_size // 4, arguments.sequences, arguments.length)
            for method in TITLES
        }
    tokens = f"{arguments.sequences} x {arguments.length} tokens"
    print(f"\nbytes that one forward pass saves for the backward pass, {tokens}, fp32, without parameters\n")
    columns = ["method", *(column for name in raw for column in (Path(name).stem, "/ full rank"))]
    rows = [[TITLES[method], *(cell for saved in raw.values() for cell in _cells(saved, method))] for method in TITLES]
    print(markdown_table(columns, rows), flush=True)
    return raw


def _peak(name: str, arguments: argparse.Namespace, models: Path) -> dict[str, dict[str, int]]:
    raw = {
        method: peak_memory(name, models, method, arguments.sequences, arguments.length, arguments.gap)
        for method in TITLES
    }
    peaks = {method: measured["peak"] for method, measured in raw.items()}
    starts = {method: human_bytes(measured["start"]) for method, measured in raw.items()}
    tokens = f"{arguments.sequences} x {arguments.length} tokens"
    print(f"\n{Path(name).stem}: peak memory of a fresh process that trains two steps, {tokens}, fp32, no DeepSpeed\n")
    columns = ("method", "before the model", "peak", "/ full rank")
    print(markdown_table(columns, [[TITLES[m], starts[m], *_cells(peaks, m)] for m in peaks]), flush=True)
    return raw


def _cells(values: Mapping[str, int], method: str) -> list[str]:
    return [human_bytes(values[method]), f"{values[method] / values['adamw']:.3f}"]


def _times(arguments: argparse.Namespace, models: Path) -> dict[str, Any]:
    config = read_model_config(arguments.model, models)
    rank = config.hidden_size // 4
    wall, cpu = time_methods(
        config,
        arguments.methods,
        rank,
        arguments.gap,
        sequences=arguments.sequences,
        length=arguments.length,
        steps=arguments.steps,
        warm_up=WARM_UP,
    )
    setting = (
        f"{Path(arguments.model).stem}, {arguments.steps} steps of {arguments.sequences} x {arguments.length} tokens, "
        f'r = {rank}, projector "{PROJECTOR}", gap {arguments.gap}, fp32, {arguments.threads} thread(s), no DeepSpeed'
    )
    for title, seconds in (("seconds", wall), ("processor seconds, which other work on a machine disturbs less", cpu)):
        print(f"\nwhole training steps, {title}: {setting}\n")
        print(markdown_table(TIME_COLUMNS, time_rows(seconds)), flush=True)
    _print_verdicts(wall)
    return {"wall": wall, "cpu": cpu}


def _print_verdicts(seconds: Mapping[str, Sequence[float]]) -> None:
    summaries = {method: Summary.of(taken) for method, taken in seconds.items()}
    ours = {method: summary for method, summary in summaries.items() if method in PROJECTED}
    for name, other, aim in (("full-rank AdamW", "adamw", AGAINST_ADAMW), ("the rule", "galore", AGAINST_RULE)):
        if ours and other in summaries:
            ratios = {method: summary.median / summaries[other].median for method, summary in ours.items()}
            print(f"\n{verdict(f'Median / that of {name}', ratios, aim)}")
    if ours:
        steady = {method: summary.p99 / summary.median for method, summary in ours.items()}
        print(f"\n{verdict('99th percentile / median', steady, STEADY)}")
