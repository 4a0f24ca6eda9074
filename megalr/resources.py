"""Ready-made DeepSpeed configurations, model shapes and recipes: where they are, installed or in a checkout."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

Kind = Literal["ds_configs", "models", "recipes"]

# Where a checkout has them. setup.py copies each folder into the package, under the name of its kind.
IN_CHECKOUT: dict[Kind, str] = {
    "ds_configs": "ds_configs",
    "models": "launchers/models",
    "recipes": "launchers/recipes",
}
_ENDINGS: dict[Kind, str] = {"ds_configs": ".json", "models": ".json", "recipes": ".yaml"}
_PACKAGE = Path(__file__).parent


def folder(kind: Kind) -> Path:
    """The folder of all shipped files of a kind: the package's own if it is there, else the checkout's."""
    packaged = _PACKAGE / kind
    return packaged if packaged.is_dir() else _PACKAGE.parent / IN_CHECKOUT[kind]


def find(name: str | Path, kind: Kind) -> Path:
    """The user's file or, where there is none, the shipped file with that name.

    Args:
        name: a path, or the name of a shipped file, with or without its ending. The path that the file has in a
            checkout, such as ``ds_configs/zero2_lowrank.json``, is a name, too.
        kind: which folder to look in.

    Returns:
        The path of a file; ``name`` as it was given where there is none.
    """
    path = Path(name).expanduser()
    if os.path.lexists(path) or str(path.parent) not in (".", IN_CHECKOUT[kind]):  # not Path.exists: it may raise
        return path
    candidates = [folder(kind) / path.name, folder(kind) / f"{path.name}{_ENDINGS[kind]}"]
    return next((file for file in candidates if os.path.isfile(file)), path)


def names(kind: Kind) -> list[str]:
    """The shipped files of a kind, without their endings."""
    return sorted(file.stem for file in folder(kind).glob(f"*{_ENDINGS[kind]}"))
