"""The folder that an export is written to: nothing in it is replaced before all of the new is on the disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megalr.checkpoint.manifest import MANIFEST
from megalr.errors import UserError

PART = ".part"
ADAPTERS, BASE = "adapter_config.json", "base"  # as megalr.checkpoint.adapters writes them
# What marks a folder as an earlier export, and what of it must not stay beside a new one.
MARKS = ("config.json", "model.safetensors", ADAPTERS)
REPLACED = ("model*.safetensors*", "pytorch_model*", "adapter_*", "config.json", "generation_config.json")


@contextmanager
def output_folder(out: Path, checkpoint: Path, *, may_replace: bool) -> Iterator[Path]:
    """An empty folder to write to, whose files are moved to ``out`` at the end.

    Args:
        out: where the export is to be; made if it is not there.
        checkpoint: what is exported, which is not to be written to.
        may_replace: whether an earlier export may be there.

    Raises:
        UserError: it is a file, not empty, no export, of the checkpoint, or cannot be written.
    """
    made = not out.exists()
    _check(out, checkpoint, may_replace)
    part = out / PART
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        yield part
        _move(part, out)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
        if made and out.is_dir() and not any(out.iterdir()):
            out.rmdir()


def _check(out: Path, checkpoint: Path, may_replace: bool) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: name a folder to write to")
    real, source = out.resolve(), checkpoint.resolve()
    if real == source or source in real.parents or (out / MANIFEST).exists():
        raise UserError(f"{out} is, or is in, a checkpoint: name a folder elsewhere to write to")
    if not out.is_dir() or all(path.name == PART for path in out.iterdir()):
        return
    if not may_replace:
        raise UserError(f"{out} is not empty: name another folder, or add --overwrite to replace an export there")
    if not any((out / mark).is_file() for mark in MARKS):
        raise UserError(f"{out} holds something else than an export, which --overwrite does not replace")


def _move(part: Path, out: Path) -> None:
    # The base model that an earlier export of adapters has beside them; any other folder there is the user's own.
    earlier = (out / ADAPTERS).is_file()
    for folder in (out, out / BASE) if earlier else (out,):
        for pattern in REPLACED:
            for stale in folder.glob(pattern):
                if stale.is_file():
                    stale.unlink()
    for path in sorted(part.rglob("*")):
        place = out / path.relative_to(part)
        if path.is_dir():
            place.mkdir(exist_ok=True)
        else:
            os.replace(path, place)
