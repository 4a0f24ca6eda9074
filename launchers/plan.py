"""What a run will hold in memory, before it is started: parameters and bytes of each model shape, by formula.

python launchers/plan.py --models 60m 350m 1b --ranks 128 256 512 --stage 2 --processes 8
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from megalr.config import FullConfig, LowRankConfig, OptimizerConfig
from megalr.errors import UserError
from megalr.layers import parametrize
from megalr.optim.groups import parameter_groups
from megalr.planner import deepspeed_bytes, human_bytes, paper_bytes
from megalr.training.models import empty_model, read_model_config

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
COLUMNS = ("model", "rank", "parameters", "paper's count", "weights", "gradients", "masters", "optimizer", "sum")


def main() -> int:
    """Print a Markdown table, a line for each shape dense and one low-rank."""
    arguments = _arguments()
    print(f"stage {arguments.stage}, {arguments.processes} processes, {arguments.dtype}; bytes of the first rank\n")
    print(_row(COLUMNS))
    print(_row(["---"] * len(COLUMNS)))
    try:
        for name, rank in zip(arguments.models, arguments.ranks, strict=True):
            print(_row(_cells(name, None, arguments)))
            print(_row(_cells(name, rank, arguments)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="+", default=["60m", "350m", "1b"], help="names in launchers/models, or paths"
    )
    parser.add_argument("--ranks", nargs="+", type=int, default=[128, 256, 512], help="the low-rank r of each model")
    parser.add_argument("--stage", type=int, choices=range(4), default=2, help="ZeRO stage (default: 2)")
    parser.add_argument("--processes", type=int, default=1, help="data-parallel size (default: 1)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the weights (default: bf16)")
    arguments = parser.parse_args()
    if len(arguments.models) != len(arguments.ranks):
        parser.error(f"{len(arguments.models)} models, but {len(arguments.ranks)} ranks: give one rank for each model")
    return arguments


def _cells(name: str, rank: int | None, arguments: argparse.Namespace) -> list[str]:
    model = empty_model(read_model_config(name, Path(__file__).parent / "models"))
    parametrize(model, FullConfig() if rank is None else LowRankConfig(rank=rank))
    groups = [[p.shape for p in g.parameters.values()] for g in parameter_groups(model, OptimizerConfig())]
    held = deepspeed_bytes(groups, stage=arguments.stage, world_size=arguments.processes, dtype=DTYPES[arguments.dtype])
    parts = (paper_bytes(model), held.weights, held.gradients, held.masters, held.optimizer_state, held.total)
    parameters = sum(p.numel() for p in model.parameters())
    return [name, "dense" if rank is None else str(rank), f"{parameters:,}", *map(human_bytes, parts)]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
