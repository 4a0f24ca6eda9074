"""Pretrain a model: the module that launchers start.

deepspeed --module megalr.pretrain --deepspeed zero2_lowrank.json
torchrun --nproc_per_node 2 -m megalr.pretrain --deepspeed zero2_lowrank.json
python -m megalr.pretrain --deepspeed zero2_lowrank.json

``--deepspeed`` takes a path, or the name of a configuration that comes with the package. ``--help`` lists the flags.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from megalr import resources
from megalr.flags import typed_as
from megalr.train import pretrain


def main(argv: Sequence[str]) -> int:
    """Pretrain as one process of those that a launcher has started, or as the only one.

    Args:
        argv: the command line without the program's name.

    Returns:
        The exit code; see :func:`megalr.train.pretrain.main`.
    """
    return pretrain.main(argv, models_folder=resources.folder("models"))


if __name__ == "__main__":
    sys.argv[0:1] = ["megalr", "pretrain"]  # a run's folder and messages repeat the command line
    with typed_as("megalr pretrain"):
        sys.exit(main(sys.argv[2:]))
