"""What the ranks run in the tests of the pretraining program: the program itself, in the pool's processes."""

from __future__ import annotations

import os
from pathlib import Path

from megalr.errors import UserError
from megalr.train.arguments import parse_arguments
from megalr.train.pretrain import pretrain
from megalr.train.ranks import AgreedError, start_ranks
from tests.deepspeed.tensor_training import tensor_parallel_groups

MODELS = Path(__file__).parents[2] / "launchers" / "models"


def train(flags: list[str], folder: str) -> None:
    """``launchers/pretrain.py`` with these flags, started in ``folder``."""
    os.chdir(folder)
    with tensor_parallel_groups():
        pretrain(parse_arguments(flags), start_ranks(), MODELS)


def disagree(flags: list[str], folders: list[str], other: list[str]) -> str:
    """What a rank hears that is on a node of its own, with a folder of its own; ``other``: flags of the last one."""
    rank, before = int(os.environ["RANK"]), os.environ["LOCAL_RANK"]
    os.chdir(folders[rank])
    os.environ["LOCAL_RANK"] = "0"
    last = rank == len(folders) - 1
    try:
        pretrain(parse_arguments([*flags, *(other if last else [])]), start_ranks(), MODELS)
    except AgreedError as error:
        return str(error)
    finally:
        os.environ["LOCAL_RANK"] = before
    return "nothing"


def fail_together(failing: int, after_barrier: bool) -> str:
    """What a rank sees of a mistake that another one finds."""
    ranks = start_ranks()
    try:
        with ranks.together():
            if after_barrier:
                ranks.barrier()
            if ranks.rank == failing:
                raise UserError(f"found by {ranks.rank}")
            if not after_barrier:
                ranks.barrier()
    except AgreedError as error:
        return str(error)
    return "nothing"


def first_decides() -> list[object]:
    """What each rank gets of rank 0's answer, and of its mistake."""
    ranks = start_ranks()
    found: list[object] = [ranks.from_first(lambda: {"rank": ranks.rank})]

    def mistake() -> None:
        raise UserError("no")

    try:
        ranks.from_first(mistake)
    except AgreedError as error:
        found.append(str(error))
    return [*found, ranks.sum([1.0, ranks.rank]), ranks.gather(ranks.rank)]
