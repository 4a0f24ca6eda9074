"""``metrics.jsonl``: one JSON object a line, of a logged step or of an evaluation."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megalr.disk import named

logger = logging.getLogger(__name__)

NUMBERS = ("step", "tokens", "loss", "eval_loss", "eval_perplexity")
LARGEST = 1 << 63


class MetricsLog:
    """Appends rows on rank 0; silent elsewhere."""

    def __init__(self, path: Path, *, enabled: bool) -> None:
        self._path = path
        self._enabled = enabled
        self._unwritten = ""  # what a full disk has refused

    def untrained_perplexity(self) -> float | None:
        """What was measured before the first update, if it was noted; None on other ranks than 0."""
        if not self._enabled:
            return None
        rows = read_rows(self._path)
        return next((row["eval_perplexity"] for row in rows if row["step"] == 0 and "eval_perplexity" in row), None)

    def last_step(self) -> int | None:
        """The last step that was noted, if any was; None on other ranks than 0."""
        return max((row["step"] for row in read_rows(self._path)), default=None) if self._enabled else None

    def is_evaluated(self, step: int) -> bool:
        """Whether an evaluation of that step was noted; False on other ranks than 0."""
        return self._enabled and any(row["step"] == step and "eval_loss" in row for row in read_rows(self._path))

    def append(self, row: dict[str, Any]) -> None:
        """Write one row, and those that could not be written before.

        A disk that is full ends no training, which has a checkpoint to write when there is room again.
        """
        if not self._enabled:
            return
        first = not self._unwritten
        self._unwritten += json.dumps(row) + "\n"
        size = self._path.stat().st_size if self._path.exists() else 0
        try:
            with self._path.open("a") as file:
                file.write(self._unwritten)
        except OSError as error:
            if self._path.exists():
                os.truncate(self._path, size)  # half a row
            if first:
                logger.warning("%s cannot be written: %s. Rows are kept until it can be.", self._path, error.strerror)
            return
        self._unwritten = ""

    def cut(self, step: int) -> None:
        """Drop rows beyond ``step``, which a resumed run writes again, and a last line that a kill has cut off.

        Lines that somebody else wrote stay; nobody reads them.
        """
        if not self._enabled or not self._path.exists():
            return
        part = self._path.with_name(f".{self._path.name}.part")
        with named(self._path), self._path.open(encoding="utf-8", errors="surrogateescape", newline="\n") as lines:
            kept = [line for line in lines if _is_kept(line, step)]
        with named(part), part.open("w", encoding="utf-8", errors="surrogateescape", newline="\n") as file:
            file.writelines(line if line.endswith("\n") else f"{line}\n" for line in kept)
        os.replace(part, self._path)


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file, which need not exist; lines that a kill has cut off, or somebody else wrote, are left out."""
    if not path.exists():
        return
    with named(path), path.open(encoding="utf-8", errors="replace", newline="\n") as lines:
        yield from (row for row in map(_row, lines) if row is not None)


def _is_kept(line: str, step: int) -> bool:
    row = _row(line)
    return line.endswith("\n") if row is None else bool(row["step"] <= step)


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and _is_row(row) else None


def _is_row(row: dict[str, Any]) -> bool:
    """Whether what is read of a row has the types that it is written in."""
    if not isinstance(row.get("step"), int) or not all(_is_number(row[name]) for name in NUMBERS if name in row):
        return False
    events = row.get("events")
    return events is None or (isinstance(events, list) and all(isinstance(name, str) for name in events))


def _is_number(value: Any) -> bool:
    """Whether it is null, or a float, or could be one: whole numbers may have any number of digits."""
    small = isinstance(value, float) or (isinstance(value, int) and abs(value) < LARGEST)
    return value is None or (small and not isinstance(value, bool))
