"""What the functions that save and load are called with, before they do anything."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megalr.checkpoint.manifest import LATEST
from megalr.errors import UserError

LONGEST_TAG = 200  # characters; hidden folders have a few more, and file systems take 255 bytes
TAG = re.compile(rf"[A-Za-z0-9_][A-Za-z0-9_.+=-]{{0,{LONGEST_TAG - 1}}}")


def folder_of(directory: Any) -> Path:
    """The absolute path of the folder of all checkpoints."""
    if not isinstance(directory, str | os.PathLike) or not str(directory):
        raise UserError(f'directory is {directory!r}: write the folder of all checkpoints, such as "checkpoints"')
    return Path(directory).expanduser().absolute()


def check_tag(tag: Any) -> None:
    """Refuse what cannot be a new checkpoint's name."""
    if not isinstance(tag, str) or not TAG.fullmatch(tag) or tag == LATEST:
        raise UserError(
            f'tag is {_written(tag)}: write a plain folder name, such as "step100": letters, digits and any of '
            f"_ . + = - after the first, {LONGEST_TAG} at most"
        )


def check_saved_tag(tag: Any) -> None:
    """Refuse what names no checkpoint; whoever has renamed one may have used any character."""
    if tag is not None and (not isinstance(tag, str) or not tag or len(os.fsencode(tag)) > LONGEST_TAG or "\0" in tag):
        raise UserError(f'tag is {_written(tag)}: write the name of a checkpoint\'s folder, such as "step100", or None')


def check_keep(keep: Any) -> None:
    """Refuse what is no number of checkpoints."""
    if keep is not None and (not isinstance(keep, int) or isinstance(keep, bool) or keep < 1):
        raise UserError(f"keep is {keep!r}: write how many checkpoints to leave, at least 1, or None for all")


def check_client_state(state: Any) -> None:
    """Refuse what JSON cannot hold, or what other readers of JSON refuse."""
    if not isinstance(state, Mapping):
        raise UserError(f'client_state is {_written(state)}: write a dictionary, such as {{"epoch": 3}}')
    try:
        json.dumps(state, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(
            f"client_state cannot be written as JSON ({error}): give numbers, strings, lists and dictionaries of them, "
            "and keep tensors in files of your own"
        ) from error


def _written(value: Any) -> str:
    written = json.dumps(value, default=repr)
    return written if len(written) <= 60 else f"{written[:57]}..."
