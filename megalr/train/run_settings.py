"""``run.json``, which says what a run was started with; every reader of it reads it here."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from megalr.config import text
from megalr.data import DataConfig
from megalr.errors import UserError
from megalr.schema import check_types

NAME = "run.json"
NOT_OF_TEXT = ("fingerprint",)  # that is in "data" beside what DataConfig has
# Without these a text would be read by a default that the run did not have.
NEEDED_OF_TEXT = ("dataset", "tokenizer", "sequence_length", "pack")


@dataclass(frozen=True)
class RunSettings:
    """What is read of it.

    Attributes:
        path: of the file.
        deepspeed: the JSON, without "auto" and without keys and passwords.
        model: a transformers configuration.
        text: what the run read.
        micro_batch_size: sequences of one pass on one process.
    """

    path: Path
    deepspeed: dict[str, Any]
    model: dict[str, Any]
    text: DataConfig
    micro_batch_size: int


def read_settings(run: Path) -> RunSettings:
    """Read a run's settings.

    Args:
        run: its folder.

    Raises:
        UserError: there are none, or they are cut, damaged, somebody else's or another version's; and what to do.
    """
    path = run / NAME
    try:
        if _never_ends(path):
            raise UserError(f"{path} is not a file")
        content = text.read(path)
        missing = [name for name in ("deepspeed", "model", "data") if not isinstance(content.get(name), dict)]
        if missing:
            raise UserError(f"{path} has no object \"{missing[0]}\": it is no run's, or another version's")
        micro = content["deepspeed"].get("train_micro_batch_size_per_gpu")
        if not isinstance(micro, int) or isinstance(micro, bool) or micro < 1:
            raise UserError(f"{path}: deepspeed.train_micro_batch_size_per_gpu is no positive whole number")
        text.check_values(content["deepspeed"])
        return RunSettings(path, content["deepspeed"], content["model"], _text(content["data"], path), micro)
    except UserError as error:
        words = str(error) if str(path) in str(error) else f"{path}: {error}"
        raise UserError(
            f"{words}. Nothing else is lost with it: --resume goes on without it and writes it anew, and `python -m "
            f"megalr.checkpoint export {run / 'checkpoints'} OUT --to hf --tokenizer NAME` writes a model"
        ) from error


def is_a_runs(path: Path) -> bool:
    """Whether a file is a run's ``run.json``, of whatever version."""
    try:
        content = {} if _never_ends(path) else text.read(path)
    except UserError:
        return False
    return isinstance(content.get("command"), str) and isinstance(content.get("deepspeed"), dict)


def _never_ends(path: Path) -> bool:
    """Whether it is a pipe or a device."""
    return os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path))


def _text(content: Mapping[str, Any], path: Path) -> DataConfig:
    known = {field.name for field in fields(DataConfig)}
    missing = [key for key in NEEDED_OF_TEXT if key not in content]
    unknown = [key for key in content if key not in known and key not in NOT_OF_TEXT]
    if missing or unknown:
        words = f"has no data.{missing[0]}" if missing else f"has data.{unknown[0]}, which this megalr does not know"
        raise UserError(f"{path} {words}: another version of megalr has written it")
    given = {key: content[key] for key in known & content.keys()}
    names = {key: given.pop(key) for key in ("dataset", "eval_dataset") if key in given}  # one name, or several
    for key, value in names.items():
        listed = value if isinstance(value, list) else [value]
        if not listed or not all(isinstance(name, str) or (name is None and key == "eval_dataset") for name in listed):
            raise UserError(f"{path}: data.{key} is neither a name nor a list of names")
    return DataConfig(**names, **check_types(DataConfig, given, f"{path}: data"))
