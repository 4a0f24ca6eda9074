"""Memory of a run, by formula, before you start it: a table with a row for each model shape and method.

megalr plan --models 60m 350m 1b --ranks 128 256 512 --stage 2 --processes 8
megalr plan --optimizers GaLoreAdamW Muon --processes 8
megalr plan --parametrizations relora sltrain --merge-rounding remainder --processes 8
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any, get_args

import torch
from torch import nn

from megalr.config.settings import FullConfig, LowRankConfig, OptimizerConfig, ParametrizationConfig, ProjectedConfig
from megalr.errors import UserError
from megalr.flags import PlainParser, nonempty, positive
from megalr.formatting import human_bytes, markdown_row
from megalr.layers.base import MergeRounding
from megalr.layers.registry import PARAMETRIZATIONS
from megalr.layers.replacement import parametrize
from megalr.memory.methods import method_memory
from megalr.optim.groups import parameter_groups
from megalr.plugins import load_plugins
from megalr.rules.base import Rule
from megalr.rules.registry import RULES

USER_ERROR_CODE = 2
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
ALWAYS = ("full", "low_rank", "projected")  # have a row without being asked for
COLUMNS = ("model", "method", "parameters", "paper's count", "weights", "gradients", "masters", "optimizer", "sum")

MakeModel = Callable[[str], nn.Module]


def main(argv: Sequence[str], make_model: MakeModel) -> int:
    """Print a Markdown table: each shape dense, low-rank, projected, and with each of the named methods.

    Args:
        argv: the command line without the program's name.
        make_model: a new model on the meta device, by the name or path of its shape.

    Returns:
        The exit code: 0, or 2 after a UserError, of which the message alone is printed.
    """
    try:
        arguments = _arguments(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR_CODE
    whose = "the first rank" + (", of rules the state of the rank with the most" if arguments.optimizers else "")
    print(f"stage {arguments.stage}, {arguments.processes} processes, {arguments.dtype}; bytes of {whose}\n")
    print(markdown_row(COLUMNS))
    print(markdown_row(["---"] * len(COLUMNS)))
    try:
        for name, rank in zip(arguments.models, arguments.ranks, strict=True):
            chosen: list[tuple[str, Any]] = [
                ("dense", FullConfig()),
                (f"low-rank {rank}", LowRankConfig(rank=rank)),
                (f"projected {rank}", ProjectedConfig(rank=rank)),
            ]
            for kind in arguments.parametrizations:
                make: Any = PARAMETRIZATIONS[kind]
                chosen.append((f"{kind} {rank}", make(rank=rank)))
            for title, parametrization in chosen:
                print(markdown_row([name, title, *_cells(make_model(name), parametrization, None, arguments)]))
            for optimizer in arguments.optimizers:
                rule, model = _rule(optimizer, rank), make_model(name)
                cells = _cells(model, FullConfig(), rule, arguments)
                print(markdown_row([name, f"{optimizer} {_rank_of(rule, model) or ''}".strip(), *cells]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR_CODE
    return 0


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    # Plugins come first: they add choices for the other flags.
    plugins = PlainParser(add_help=False)
    plugins.add_argument(
        "--plugins",
        type=nonempty,
        nargs="+",
        default=[],
        help="modules or .py files whose rules and parametrizations to know",
    )
    parser = PlainParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[plugins])
    load_plugins(plugins.parse_known_args(argv)[0].plugins)
    rules = [name for name, kind in RULES.items() if kind is not None]
    others = [name for name in PARAMETRIZATIONS if name not in ALWAYS]
    merged = [name for name, kind in PARAMETRIZATIONS.items() if hasattr(kind, "merge_rounding")]
    parser.add_argument(
        "--models",
        type=nonempty,
        nargs="+",
        default=["60m", "350m", "1b"],
        help="names of shipped shapes (tiny, 9m, 60m, 130m, 350m, 1b, 7b), or paths of their JSON",
    )
    parser.add_argument("--ranks", nargs="+", type=positive, default=[128, 256, 512], help="r of each model")
    parser.add_argument("--stage", type=int, choices=range(4), default=2, help="ZeRO stage (default: 2)")
    parser.add_argument("--processes", type=positive, default=1, help="data-parallel size (default: 1)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the weights (default: bf16)")
    parser.add_argument(
        "--optimizers",
        nargs="+",
        default=[],
        choices=rules,
        metavar="OPTIMIZER",
        help=f"rules on the dense model to add, at the same r: {', '.join(rules)}",
    )
    parser.add_argument(
        "--parametrizations",
        nargs="+",
        default=[],
        choices=others,
        metavar="PARAMETRIZATION",
        help=f"others to add to {', '.join(ALWAYS)}, at the same r: {', '.join(others)}",
    )
    parser.add_argument(
        "--merge-rounding",
        choices=get_args(MergeRounding),
        default="nearest",
        help=f"of {', '.join(merged)}: in bf16 a remainder takes memory from the first merge on (default: nearest)",
    )
    arguments = parser.parse_args(argv)
    if len(arguments.models) != len(arguments.ranks):
        parser.error(f"{len(arguments.models)} models, but {len(arguments.ranks)} ranks: give one rank for each model")
    return arguments


def _cells(
    model: nn.Module, parametrization: ParametrizationConfig, rule: Rule | None, arguments: argparse.Namespace
) -> list[str]:
    """All cells of a row but the first two."""
    if hasattr(parametrization, "merge_rounding"):
        changed: Any = {"merge_rounding": arguments.merge_rounding}
        parametrization = dataclasses.replace(parametrization, **changed)
    parametrize(model, parametrization)
    memory = method_memory(
        model,
        parameter_groups(model, OptimizerConfig(rule=rule)),
        parametrization,
        stage=arguments.stage,
        world_size=arguments.processes,
        dtype=DTYPES[arguments.dtype],
    )
    largest = max(rank.optimizer_state for rank in memory.ranks)
    held = dataclasses.replace(memory.ranks[0], optimizer_state=largest)
    parts = (memory.papers, held.weights, held.gradients, held.masters, held.optimizer_state, held.total)
    return [f"{memory.parameters:,}", *map(human_bytes, parts)]


def _rule(optimizer: str, rank: int) -> Rule:
    kind = RULES[optimizer]
    assert kind is not None
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    given: dict[str, int] = {}
    if "rank" in fields and fields["rank"].default != 1:  # APOLLO-Mini's is 1 by definition
        given["rank"] = rank
    if "random_from" in fields:
        given["random_from"] = 1
    return kind(**given)


def _rank_of(rule: Rule, model: nn.Module) -> int | None:
    """The rank that the rule has for the largest of its matrices."""
    groups = parameter_groups(model, OptimizerConfig(rule=rule))
    shapes = [p.shape for group in groups if group.rule is not None for p in group.parameters.values()]
    m, n = max(((shape[-2], shape[-1]) for shape in shapes), key=min)
    return rule.rank_of((m, n))
