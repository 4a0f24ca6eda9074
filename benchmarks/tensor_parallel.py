"""Tensor parallelism of low-rank layers against full rank and a naive split: bytes that cross the network, step times.

Every figure but Megatron-LM's, which is a formula, comes from live processes on CPUs. Bytes are those of one forward
and one backward pass of a decoder layer, for a token; what the model's two ends send is not in them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.accounting import sent_bytes
from benchmarks.flags import add_output, add_ranks, write_output
from benchmarks.ranks import from_ranks
from benchmarks.timing import Summary
from megalr.errors import UserError
from megalr.flags import positive
from megalr.formatting import markdown_table
from megalr.train.models import read_model_config

FULL, NAIVE, LOW_RANK = "full rank, AutoTP", "low-rank, both factors cut", "low-rank, as here"
MEGATRON = "full rank, Megatron-LM"
MESSAGES = 4  # of Megatron-LM's in a layer, each as wide as the model: forward and backward, attention and MLP
AIMS = {FULL: None, MEGATRON: 0.5, NAIVE: 0.25}  # low-rank's bytes over theirs
FP32 = 4  # bytes
TIMEOUT = 3600.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    switch = argparse.BooleanOptionalAction
    parser.add_argument("--counts", action=switch, default=True, help="bytes (default: yes)")
    parser.add_argument("--time", action=switch, default=True, help="step times (default: yes)")
    parser.add_argument("--models", nargs="+", default=["60m"], help="shapes of the counts, cut to two layers")
    add_ranks(parser, "tensor-parallel", "shape of the times (default: 60m)")
    parser.add_argument("--steps", type=positive, default=20, help="timed steps of each (default: 20)")
    parser.add_argument("--tokens", type=positive, default=256, help="of a step (default: 256)")
    add_output(parser)


def run(arguments: argparse.Namespace, models: Path) -> None:
    """Measure, print Markdown, and write the raw numbers if asked.

    Args:
        arguments: of :func:`add_arguments`.
        models: the folder of the named shapes.
    """
    if arguments.processes < 2 or arguments.steps < 1:
        raise UserError("--processes has to be at least 2 and --steps at least 1")
    raw: dict[str, Any] = {"processes": arguments.processes, "tokens": arguments.tokens}
    if arguments.counts:
        shapes = {name: read_model_config(name, models).to_dict() for name in arguments.models}
        raw["bytes"] = {name: count(shape, arguments.processes) for name, shape in shapes.items()}
        print(count_report(raw["bytes"], arguments.processes))
    if arguments.time:
        shape = read_model_config(arguments.model, models).to_dict()
        raw["seconds"] = times(shape, arguments.processes, arguments.steps, arguments.tokens)
        print(time_report(raw["seconds"], arguments.model, arguments.processes, arguments.tokens))
        # What of the ratio is there without messages, since low-rank layers compute less as well.
        raw["seconds_of_one"] = times(shape, 1, arguments.steps, arguments.tokens)
        print(time_report(raw["seconds_of_one"], arguments.model, 1, arguments.tokens))
    write_output(arguments, raw)


def count(shape: Mapping[str, Any], processes: int) -> dict[str, float]:
    """Bytes that a rank sends for a layer and token, by contender, in fp32.

    Counted, but for Megatron-LM's, which sends one message where AutoTP's q, k and v, or gate and up, send one each.

    Args:
        shape: of a LLaMA, as its configuration has it; the rank is a quarter of its width.
        processes: tensor-parallel ranks.
    """
    ranks = _from_ranks("count", {"shape": dict(shape)}, processes)
    counted = {name: max(rank[name] for rank in ranks) for name in (FULL, NAIVE, LOW_RANK)}
    message = sent_bytes("all_reduce", FP32 * shape["hidden_size"], processes)
    return {FULL: counted[FULL], MEGATRON: MESSAGES * message, NAIVE: counted[NAIVE], LOW_RANK: counted[LOW_RANK]}


def times(shape: Mapping[str, Any], processes: int, steps: int, tokens: int) -> dict[str, list[float]]:
    """Seconds of each training step, full rank and low-rank in turns; of a step the slowest rank's."""
    ranks = _from_ranks("time", {"shape": dict(shape), "steps": steps, "tokens": tokens}, processes)
    return {name: [max(each) for each in zip(*(rank[name] for rank in ranks), strict=True)] for name in ranks[0]}


def count_report(counted: Mapping[str, Mapping[str, float]], processes: int) -> str:
    """A Markdown table."""
    columns = ("model", *(next(iter(counted.values()))), *(f"/ {name}" for name in AIMS))
    lines = []
    for model, sent in counted.items():
        ratios = [f"{sent[LOW_RANK] / sent[name]:.2f}" + f" (aim {aim})" * bool(aim) for name, aim in AIMS.items()]
        lines.append([model, *(f"{value:,.0f}" for value in sent.values()), *ratios])
    head = f"Bytes that a rank sends for a layer and token, forward and backward, {processes} ranks, r = d/4, fp32\n\n"
    return head + markdown_table(columns, lines) + "\n"


def time_report(seconds: Mapping[str, Sequence[float]], model: str, processes: int, tokens: int) -> str:
    """A Markdown table; the first step of each is left out."""
    found = {name: Summary.of(each[1:] or each) for name, each in seconds.items()}
    base = found[FULL].median
    lines = [[name, f"{each.median:.3f}", f"{each.median / base:.2f}"] for name, each in found.items()]
    cut = f"{processes} CPU process{'es' if processes > 1 else ''}"
    head = f"A training step of {model}, {tokens} tokens, {cut} of one thread, r = d/4\n\n"
    return head + markdown_table(("", "median, s", "/ full rank"), lines) + "\n"


def _from_ranks(what: str, request: Mapping[str, Any], processes: int) -> list[Any]:
    arguments = [json.dumps({"what": what, **request})]
    return from_ranks("benchmarks.tensor_parallel_rank", processes, TIMEOUT, arguments)
