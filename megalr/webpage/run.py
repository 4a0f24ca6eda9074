"""A run's folder as a page shows it: settings, results, state, history."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megalr import locks
from megalr.checkpoint.folders import listed
from megalr.checkpoint.inputs import open_inside
from megalr.errors import UserError
from megalr.train.run_folder import RunFolder
from megalr.webpage.foreign import finite, read_object
from megalr.webpage.history import History, read_history

State = Literal["finished", "running", "stopped"]

FRESH = 900.0  # seconds since the last row, for a run on another node, whose process cannot be looked for


@dataclass(frozen=True)
class Run:
    """What a folder says of its run.

    Attributes:
        path: the folder.
        state: whether it has finished, still trains, or was stopped before its end.
        settings: ``run.json``; empty if it cannot be read.
        summary: ``summary.json`` of a finished run; empty for others.
        history: what it measured.
        notes: sentences on what could not be read.
    """

    path: Path
    state: State
    settings: Mapping[str, Any]
    summary: Mapping[str, Any]
    history: History
    notes: list[str]

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.name or str(self.path)

    @property
    def perplexity(self) -> float | None:
        """The last held-out perplexity: at the end, or so far; None if there is none that is finite."""
        evaluations = self.history.held_out("eval_perplexity")
        last = finite(float(evaluations[-1])) if len(evaluations) else None
        found = finite(self.summary.get("perplexity"))
        return last if found is None else found

    @property
    def is_of_a_sample(self) -> bool:
        """Whether that perplexity is of a sample of the held-out text."""
        kinds = self.history.held_out("is_sample")
        return finite(self.summary.get("perplexity")) is None and len(kinds) > 0 and bool(kinds[-1])

    def section(self, name: str) -> Mapping[str, Any]:
        """An object of ``run.json``; empty if there is none."""
        found = self.settings.get(name)
        return found if isinstance(found, dict) else {}


def read_run(folder: Path) -> Run:
    """Read a run's folder; files that are missing or damaged are left out, with a note.

    Args:
        folder: of a run that has finished, was stopped, or still trains.

    Raises:
        UserError: it is no folder, or no run is in it.
    """
    folder = folder.expanduser().absolute()
    if not os.path.isdir(folder):
        raise UserError(f"{folder} is a file: name a run's folder" if folder.exists() else f"there is no {folder}")
    try:
        os.listdir(folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}") from error
    settings, no_settings = read_object(folder, "run.json")
    summary, no_summary = read_object(folder, "summary.json")
    history = read_history(folder)
    _refuse_others(folder, settings, history)
    notes = [note for note in (no_settings, history.wrong) if note]
    if no_summary and os.path.lexists(folder / "summary.json"):
        notes.append(no_summary)
    if history.is_empty and not history.wrong:
        notes.append(
            "metrics.jsonl holds no rows" if (folder / "metrics.jsonl").exists() else "there is no metrics.jsonl"
        )
    return Run(folder, _state(folder, summary), settings, summary, history, notes)


def _refuse_others(folder: Path, settings: Mapping[str, Any], history: History) -> None:
    is_a_runs = isinstance(settings.get("deepspeed"), dict) or isinstance(settings.get("command"), str)
    if is_a_runs or not history.is_empty or any(each.manifest for each in listed(RunFolder(folder).checkpoints)):
        return
    above = next((place for place in folder.parents[:2] if os.path.isfile(place / "run.json")), None)
    if above is not None:
        raise UserError(f"{folder} holds no run: its run is {above}")
    raise UserError(
        f"{folder} holds no run: it has no run.json, no rows in metrics.jsonl and no checkpoint that can be read. Name "
        "a run's folder"
    )


def _state(folder: Path, summary: Mapping[str, Any]) -> State:
    if summary:
        return "finished"
    return "running" if _is_written(folder) else "stopped"


def _is_written(folder: Path) -> bool:
    """Whether a process writes into the folder, as far as can be known from here."""
    try:
        with open_inside(folder, locks.NAME) as file:
            lives = locks.holder_lives(file.fileno())
        if lives is None:
            return time.time() - os.stat(folder / "metrics.jsonl").st_mtime < FRESH
        return lives
    except OSError:
        return False
