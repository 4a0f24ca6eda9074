"""What a run will hold in memory, before it is started: parameters and bytes of each model shape, by formula.

python launchers/plan.py --models 60m 350m 1b --ranks 128 256 512 --stage 2 --processes 8
python launchers/plan.py --optimizers GaLoreAdamW Muon --processes 8
python launchers/plan.py --parametrizations relora sltrain --merge-rounding remainder --processes 8
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch

from megalr.config.settings import FullConfig, LowRankConfig, OptimizerConfig, ParametrizationConfig, ProjectedConfig
from megalr.errors import UserError
from megalr.layers import parametrize
from megalr.layers.base import MergeRounding
from megalr.layers.registry import PARAMETRIZATIONS
from megalr.layout.planned import planned_layout
from megalr.memory.formulas import (
    ParameterRecord,
    buffer_bytes,
    deepspeed_bytes,
    frozen_shapes,
    merged_shapes,
    paper_bytes,
)
from megalr.optim.groups import parameter_groups
from megalr.optim.matrices import kept_bytes, matrix_shapes, papers_floats
from megalr.plugins import load_plugins
from megalr.rules.base import Rule
from megalr.rules.registry import RULES
from megalr.train.models import empty_model, read_model_config
from megalr.train.report import human_bytes

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
ALWAYS = ("full", "low_rank", "projected")  # have a line unasked
COLUMNS = ("model", "method", "parameters", "paper's count", "weights", "gradients", "masters", "optimizer", "sum")


def main() -> int:
    """Print a Markdown table: each shape dense, low-rank, projected, and with each of the named optimizers."""
    arguments = _arguments()
    whose = "the first rank" + (", of rules the state of the rank with the most" if arguments.optimizers else "")
    print(f"stage {arguments.stage}, {arguments.processes} processes, {arguments.dtype}; bytes of {whose}\n")
    print(_row(COLUMNS))
    print(_row(["---"] * len(COLUMNS)))
    try:
        for name, rank in zip(arguments.models, arguments.ranks, strict=True):
            print(_row(_cells(name, "dense", FullConfig(), arguments)))
            print(_row(_cells(name, f"low-rank {rank}", LowRankConfig(rank=rank), arguments)))
            print(_row(_cells(name, f"projected {rank}", ProjectedConfig(rank=rank), arguments)))
            for kind in arguments.parametrizations:
                print(_row(_cells(name, f"{kind} {rank}", PARAMETRIZATIONS[kind](rank=rank), arguments)))
            for optimizer in arguments.optimizers:
                print(_row(_rule_cells(name, rank, optimizer, arguments)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _arguments() -> argparse.Namespace:
    # Of the others' choices some may be plugins', which have to be there first.
    plugins = argparse.ArgumentParser(add_help=False)
    plugins.add_argument(
        "--plugins", nargs="+", default=[], help="modules or .py files whose rules and parametrizations to know"
    )
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[plugins]
    )
    try:
        load_plugins(plugins.parse_known_args()[0].plugins)
    except UserError as error:
        parser.error(str(error))
    rules = [name for name, kind in RULES.items() if kind is not None]
    others = [name for name in PARAMETRIZATIONS if name not in ALWAYS]
    merged = [name for name, kind in PARAMETRIZATIONS.items() if hasattr(kind, "merge_rounding")]
    parser.add_argument(
        "--models", nargs="+", default=["60m", "350m", "1b"], help="names in launchers/models, or paths"
    )
    parser.add_argument("--ranks", nargs="+", type=int, default=[128, 256, 512], help="r of each model")
    parser.add_argument("--stage", type=int, choices=range(4), default=2, help="ZeRO stage (default: 2)")
    parser.add_argument("--processes", type=int, default=1, help="data-parallel size (default: 1)")
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
    arguments = parser.parse_args()
    if len(arguments.models) != len(arguments.ranks):
        parser.error(f"{len(arguments.models)} models, but {len(arguments.ranks)} ranks: give one rank for each model")
    return arguments


def _cells(name: str, title: str, parametrization: ParametrizationConfig, arguments: argparse.Namespace) -> list[str]:
    if hasattr(parametrization, "merge_rounding"):
        changed: Any = {"merge_rounding": arguments.merge_rounding}
        parametrization = dataclasses.replace(parametrization, **changed)
    model = empty_model(read_model_config(name, Path(__file__).parent / "models"))
    parametrize(model, parametrization)
    groups = [[p.shape for p in g.parameters.values()] for g in parameter_groups(model, OptimizerConfig())]
    held = deepspeed_bytes(
        groups,
        stage=arguments.stage,
        world_size=arguments.processes,
        dtype=DTYPES[arguments.dtype],
        frozen=frozen_shapes(model),
        buffers=buffer_bytes(model),
        merged=merged_shapes(model, parametrization),
    )
    parts = (paper_bytes(model), held.weights, held.gradients, held.masters, held.optimizer_state, held.total)
    parameters = sum(p.numel() for p in model.parameters())
    return [name, title, f"{parameters:,}", *map(human_bytes, parts)]


def _rule_cells(name: str, rank: int, optimizer: str, arguments: argparse.Namespace) -> list[str]:
    """The dense model with a rule on its matrices."""
    rule = _rule(optimizer, rank)
    model = empty_model(read_model_config(name, Path(__file__).parent / "models"))
    groups = parameter_groups(model, OptimizerConfig(rule=rule))
    shapes = [{n: tuple(p.shape) for n, p in g.parameters.items()} for g in groups]
    (index,) = (i for i, g in enumerate(groups) if g.name == "matrices")
    layout = planned_layout(shapes, stage=arguments.stage, world_size=arguments.processes).matrices(shapes[index])
    resting = rule.resting(list(layout.shapes), 0, 0)
    held = deepspeed_bytes(
        [list(group.values()) for group in shapes],
        stage=arguments.stage,
        world_size=arguments.processes,
        dtype=DTYPES[arguments.dtype],
        treated=[index],
        treated_bytes=max(kept_bytes(rule, layout, seed=0, replicated=arguments.stage == 0)),
    )

    def own_state(record: ParameterRecord) -> int | None:
        if record.name not in shapes[index]:
            return None
        return 0 if record.name in resting else papers_floats(rule, (record.shape[0], record.shape[1]))

    by_papers = paper_bytes(model, treated_state=own_state)
    parts = (by_papers, held.weights, held.gradients, held.masters, held.optimizer_state, held.total)
    used = rule.rank_of(max(matrix_shapes(layout).values(), key=min))
    parameters = sum(p.numel() for p in model.parameters())
    return [name, f"{optimizer} {used or ''}".strip(), f"{parameters:,}", *map(human_bytes, parts)]


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


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
