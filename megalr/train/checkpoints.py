"""A run's checkpoints: of any layout, with all that a run needs to go on bit for bit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import megalr
from megalr.checkpoint.folders import newest_whole
from megalr.checkpoint.loading import load_whole
from megalr.checkpoint.manifest import Manifest
from megalr.errors import UserError
from megalr.hosts import host_of
from megalr.train.run_folder import RunFolder

# Among the data of a checkpoint: fingerprint of the text that is evaluated on, and digest of the tokenizer.
HELD_OUT, TOKENIZER = "held_out", "tokenizer"


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


@dataclass(frozen=True)
class Resumable:
    """A checkpoint to go on from, whose files have been checked.

    Attributes:
        notes: what it says of the run.
        manifest: what it says of itself.
        skipped: newer ones that are not valid, and why.
    """

    notes: Notes
    manifest: Manifest
    skipped: list[str]


def save_checkpoint(
    engine: Any, folder: RunFolder, notes: Notes, data_state: dict[str, Any], *, keep: int | None
) -> None:
    """Begin to write a checkpoint, beside the training that goes on. Collective.

    Raises:
        UserError: the one before could not be written.
    """
    state = {"run": {key: value for key, value in vars(notes).items() if key != "tag"}, "data": data_state}
    megalr.save_checkpoint(
        engine, folder.checkpoints, notes.tag, client_state=_plain(state), keep=keep, asynchronous=True
    )


def find_checkpoint(folder: RunFolder) -> Resumable:
    """The folder's newest valid checkpoint.

    Raises:
        UserError: there is none, or it is not a run's.
    """
    manifest, skipped = newest_whole(folder.checkpoints)
    return Resumable(notes_of(manifest), manifest, skipped)


def notes_of(manifest: Manifest) -> Notes:
    """What a run's checkpoint says of the run.

    Raises:
        UserError: it is not a run's.
    """
    try:
        notes = Notes(tag=manifest.folder.name, **manifest.content["client"]["run"])
        for section in (notes.required, notes.settings):
            if not isinstance(section, Mapping):
                raise TypeError(f"its settings are {section!r}")
        return notes
    except (KeyError, TypeError) as error:
        raise UserError(f"{manifest.folder} is no checkpoint of a pretraining run: {error}") from error


def text_of(manifest: Manifest) -> dict[str, str]:
    """Digests of what a run has read: "data", the training text; ``HELD_OUT``, ``TOKENIZER``. Older ones lack some."""
    client = manifest.content["client"]
    data = client.get("data") if isinstance(client, Mapping) else None
    known = data if isinstance(data, Mapping) else {}
    return {key: known[key] for key in ("data", HELD_OUT, TOKENIZER) if isinstance(known.get(key), str)}


def check_notes(notes: Notes, required: Mapping[str, Any], folder: RunFolder) -> None:
    """Refuse a checkpoint of another model, batch size or parametrization.

    Raises:
        UserError: naming everything that differs.
    """
    found = differences(notes.required, required)
    if found:
        raise UserError(
            f"{folder.checkpoints / notes.tag} cannot be continued with these settings (checkpoint -> now):\n"
            + "\n".join(f"  {line}" for line in found)
        )


def load_checkpoint(engine: Any, manifest: Manifest) -> dict[str, Any]:
    """Load what :func:`save_checkpoint` wrote, random states included; what is dropped is in the log. Collective.

    Returns:
        The data stream's state.
    """
    loaded = load_whole(engine, manifest)
    host_of(engine).refresh_rates()  # those of this configuration, not those that were saved
    data: dict[str, Any] = loaded.client_state["data"]
    return data


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
