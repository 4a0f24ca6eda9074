"""A run's checkpoints: DeepSpeed's own, with all else that a run needs to go on bit for bit."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megalr.errors import UserError
from megalr.training.ranks import Ranks
from megalr.training.run_folder import RunFolder, write_json

_NOTES = "megalr.json"
_CLIENT_KEY = "megalr_run"


@dataclass(frozen=True)
class Notes:
    """What can be known of a checkpoint without loading it.

    Attributes:
        tag: its folder under ``checkpoints``.
        step: updates behind it.
        tokens: tokens read.
        required: settings that have to be the same in a run that continues it.
        settings: further settings, which may differ.
    """

    tag: str
    step: int
    tokens: int
    required: dict[str, Any]
    settings: dict[str, Any]


def save_checkpoint(engine: Any, folder: RunFolder, notes: Notes, data_state: dict[str, Any], ranks: Ranks) -> None:
    """Write a checkpoint and make it the latest. Collective."""
    if ranks.is_first:
        place = folder.checkpoints / notes.tag
        place.mkdir(parents=True, exist_ok=True)
        write_json(place / _NOTES, {key: value for key, value in vars(notes).items() if key != "tag"})
    state = {"data": data_state, "random": ranks.gather(_random_state())}
    engine.save_checkpoint(str(folder.checkpoints), tag=notes.tag, client_state={_CLIENT_KEY: state})


def read_notes(folder: RunFolder) -> Notes:
    """What the folder's latest checkpoint says of itself.

    Raises:
        UserError: it is not there or not a run's.
    """
    tag = (folder.checkpoints / "latest").read_text().strip()
    path = folder.checkpoints / tag / _NOTES
    try:
        return Notes(tag=tag, **json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path.parent} is no checkpoint of a pretraining run: {error}") from error


def check_notes(notes: Notes, required: Mapping[str, Any], folder: RunFolder) -> None:
    """Refuse a checkpoint of another model, number of processes or configuration.

    Raises:
        UserError: naming everything that differs.
    """
    found = differences(notes.required, required)
    if found:
        raise UserError(
            f"{folder.checkpoints / notes.tag} cannot be continued with these settings (checkpoint -> now):\n"
            + "\n".join(f"  {line}" for line in found)
        )


def load_checkpoint(engine: Any, folder: RunFolder, notes: Notes, ranks: Ranks) -> dict[str, Any]:
    """Load what :func:`save_checkpoint` wrote, random states included. Collective.

    Returns:
        The data stream's state.
    """
    path, client = engine.load_checkpoint(str(folder.checkpoints), tag=notes.tag)
    if path is None:
        raise UserError(f"DeepSpeed could not load {folder.checkpoints / notes.tag}: files are missing there")
    scheduler = engine.lr_scheduler
    if hasattr(scheduler, "last_batch_iteration"):
        scheduler.step(scheduler.last_batch_iteration)  # the rates of this configuration, not those that were saved
    state = client[_CLIENT_KEY]
    _set_random_state(state["random"][ranks.rank])
    data_state: dict[str, Any] = state["data"]
    return data_state


def differences(old: Mapping[str, Any], new: Mapping[str, Any], where: str = "") -> list[str]:
    """One line for each value that is not the same, by its path: ``model.hidden_size: 128 -> 256``."""
    found = []
    before, after = _plain(old), _plain(new)
    for key in sorted({*before, *after}):
        one, other = before.get(key), after.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            found += differences(one, other, f"{where}{key}.")
        elif one != other:
            found.append(f"{where}{key}: {json.dumps(one)} -> {json.dumps(other)}")
    return found


def _plain(value: Any) -> Any:
    """As JSON gives it back: tuples are lists there, keys strings."""
    return json.loads(json.dumps(value, default=str))


def _random_state() -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
