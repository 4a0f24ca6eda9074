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

CONFIG_FLAGS = ("--deepspeed", "--deepspeed_config")


def main(argv: Sequence[str]) -> int:
    """Pretrain as one process of those that a launcher has started, or as the only one.

    Args:
        argv: the command line without the program's name.

    Returns:
        The exit code; see :func:`megalr.train.pretrain.main`.
    """
    return pretrain.main(with_shipped_config(argv), models_folder=resources.folder("models"))


def with_shipped_config(argv: Sequence[str]) -> list[str]:
    """The command line with the path of a shipped configuration in the place of its name."""
    words = list(argv)
    for index, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if flag in CONFIG_FLAGS and equals:
            words[index] = f"{flag}={_path(value)}"
        elif flag in CONFIG_FLAGS and index + 1 < len(words):
            words[index + 1] = _path(words[index + 1])
    return words


def _path(name: str) -> str:
    return str(resources.find(name, "ds_configs")) if name.strip() else name  # an empty name is refused by the parser


if __name__ == "__main__":
    sys.argv[0:1] = ["megalr", "pretrain"]  # a run's folder and messages repeat the command line
    with typed_as("megalr pretrain"):
        sys.exit(main(sys.argv[2:]))
