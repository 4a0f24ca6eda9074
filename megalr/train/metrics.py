"""``metrics.jsonl``: one JSON object a line, of a logged step or of an evaluation."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class MetricsLog:
    """Appends rows on rank 0; silent elsewhere."""

    def __init__(self, path: Path, *, enabled: bool) -> None:
        self._path = path
        self._enabled = enabled

    def untrained_perplexity(self) -> float | None:
        """What was measured before the first update, if it was noted; None on other ranks than 0."""
        if not self._enabled or not self._path.exists():
            return None
        rows = (json.loads(line) for line in self._path.read_text().splitlines())
        return next((row["eval_perplexity"] for row in rows if row["step"] == 0 and "eval_perplexity" in row), None)

    def append(self, row: dict[str, Any]) -> None:
        """Write one row; it is on disk before the next step starts."""
        if self._enabled:
            with self._path.open("a") as file:
                file.write(json.dumps(row) + "\n")

    def cut(self, step: int) -> None:
        """Drop rows beyond ``step``, which a resumed run writes again, and a line that a kill cut off."""
        if not self._enabled or not self._path.exists():
            return
        kept = []
        for line in self._path.read_text().splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if row["step"] <= step:
                kept.append(line)
        part = self._path.with_name(f".{self._path.name}.part")
        part.write_text("".join(f"{line}\n" for line in kept))
        os.replace(part, self._path)
