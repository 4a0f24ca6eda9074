"""The rows of ``metrics.jsonl`` as columns of numbers, which take little memory even for a million rows."""

from __future__ import annotations

import math
import os
from array import array
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megalr.checkpoint.inputs import open_inside
from megalr.errors import UserError
from megalr.train.metrics import read_rows
from megalr.webpage.foreign import LONGEST, number

Floats = NDArray[np.float64]

LARGEST_FILE = 1 << 32  # bytes
PLAIN = (
    "epoch",
    "loss",
    "lr",
    "grad_norm",
    "exchange_bytes",
    "tokens_per_second",
    "tokens_per_second_per_rank",
    "tflops_per_rank",
    "mfu",
    "memory_bytes",
    "peak_memory_bytes",
)
NESTED = ("learning_rates", "seconds")  # objects of numbers; a column each
EVALUATION = ("epoch", "eval_loss", "eval_perplexity")
MOST_NESTED = 64  # keys of one such object
MOST_FIELDS = 160
MOST_KINDS = 24  # of events; others count as one more kind
OTHER_EVENTS = "other events"


class Columns:
    """Rows as one array of float64 for each field; a field that a row lacks is NaN there."""

    def __init__(self) -> None:
        self.steps = array("d")
        self._fields: dict[str, array[float]] = {}

    def __len__(self) -> int:
        return len(self.steps)

    def append(self, step: int, values: Iterator[tuple[str, float]]) -> None:
        """Add a row."""
        for name, value in values:
            column = self._fields.get(name)
            if column is None:
                if len(self._fields) >= MOST_FIELDS:
                    continue
                column = self._fields[name] = array("d")
            if len(column) > len(self.steps):  # two keys that are alike once they are shortened
                continue
            column.extend([math.nan] * (len(self.steps) - len(column)))
            column.append(value)
        self.steps.append(step)

    def cut(self, length: int) -> None:
        """Drop all rows from the ``length``-th on."""
        for column in (self.steps, *self._fields.values()):
            del column[length:]

    def names(self, prefix: str) -> list[str]:
        """Fields whose name begins so, without the prefix."""
        return [name.removeprefix(prefix) for name in self._fields if name.startswith(prefix)]

    def __getitem__(self, name: str) -> Floats:
        """A field, (rows,) float64; all NaN if no row has it."""
        column = np.array(self.steps if name == "step" else self._fields.get(name, ()), dtype=np.float64)
        return np.concatenate([column, np.full(len(self) - len(column), np.nan)])


@dataclass
class History:
    """What a run has written while it trained, in the order of its steps.

    Attributes:
        training: a row for each logged update.
        evaluations: a row for each evaluation of the whole held-out text.
        samples: a row for each evaluation of a sample of it.
        events: by kind, the rows of ``training`` in which it took place.
        reasons: by row of ``training``, why that update was skipped.
        wrong: why the file could not be read; empty if it could, or if there is none.
    """

    training: Columns = field(default_factory=Columns)
    evaluations: Columns = field(default_factory=Columns)
    samples: Columns = field(default_factory=Columns)
    events: dict[str, list[int]] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    wrong: str = ""

    @property
    def is_empty(self) -> bool:
        """Whether nothing was measured."""
        return not any(map(len, (self.training, self.evaluations, self.samples)))

    def held_out(self, name: str) -> Floats:
        """A field of both kinds of evaluations, by step, at one step the whole text last; "is_sample" is 1 or 0."""
        both = (self.samples, self.evaluations)
        order = np.argsort(np.concatenate([each["step"] for each in both]), kind="stable")
        if name == "is_sample":
            return np.repeat([1.0, 0.0], [len(each) for each in both])[order]
        return np.concatenate([each[name] for each in both])[order]


def read_history(run: Path) -> History:
    """Read a run's ``metrics.jsonl``.

    Where steps go back, a resumed run repeated them: rows that the earlier run wrote of these steps are dropped, as
    :func:`megalr.train.loss_curve.read_history` does. Lines that are no rows are left out.

    Args:
        run: the run's folder.
    """
    history = History()
    try:
        with open_inside(run, "metrics.jsonl") as file:
            size = os.fstat(file.fileno()).st_size
        if size > LARGEST_FILE:
            raise UserError(f"it has {size:,} bytes, of at most {LARGEST_FILE:,}")
        for row in read_rows(run / "metrics.jsonl"):
            _add(history, row)
    except FileNotFoundError:
        pass
    except (OSError, UserError) as error:
        history.wrong = f"metrics.jsonl cannot be read: {getattr(error, 'strerror', None) or error}"
    return history


def _add(history: History, row: dict[str, Any]) -> None:
    step, tokens = row["step"], number(row.get("tokens"))
    if not math.isfinite(number(step)) or not math.isfinite(tokens):
        return
    training = history.training
    if "loss" in row:
        if len(training) and step <= training.steps[-1]:
            _go_back(history, step)
        index = len(training)
        training.append(step, _numbers(row, tokens))
        for name in row.get("events") or ():
            kind = name[:LONGEST]
            if kind not in history.events and len(history.events) >= MOST_KINDS:
                kind = OTHER_EVENTS
            history.events.setdefault(kind, []).append(index)
        if isinstance(row.get("skipped"), str):
            history.reasons[index] = row["skipped"][:LONGEST]
    if "eval_loss" in row:
        evaluations = history.samples if row.get("eval_is_sample") is True else history.evaluations
        evaluations.cut(bisect_left(evaluations.steps, step))  # measured again
        found = ((name, number(row.get(name))) for name in EVALUATION)
        evaluations.append(step, iter([("tokens", tokens), *found]))


def _go_back(history: History, step: int) -> None:
    """Drop everything from a step on."""
    length = bisect_left(history.training.steps, step)
    history.training.cut(length)
    for evaluations in (history.evaluations, history.samples):
        evaluations.cut(bisect_left(evaluations.steps, step))
    for name in list(history.events):
        rows = history.events[name]
        del rows[bisect_left(rows, length) :]
        if not rows:
            del history.events[name]
    while history.reasons and (last := next(reversed(history.reasons))) >= length:
        del history.reasons[last]


def _numbers(row: dict[str, Any], tokens: float) -> Iterator[tuple[str, float]]:
    yield "tokens", tokens
    for name in PLAIN:
        if name in row:
            yield name, number(row[name])
    for name in NESTED:
        inner = row.get(name)
        if isinstance(inner, dict):
            for key, value in list(inner.items())[:MOST_NESTED]:
                yield f"{name}.{key[:LONGEST]}", number(value)
