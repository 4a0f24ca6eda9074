"""What is noted of a benchmark's runs, one line of JSON each."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megalr.comparison.runs import Run
from megalr.errors import UserError
from megalr.processes import Ended
from megalr.train.loss_curve import read_history
from megalr.train.metrics import read_rows
from megalr.train.run_folder import RunFolder
from megalr.train.runner import USER_ERROR_CODE

CURVE_POINTS = 100  # of a run's training loss, each the mean of its share of the steps
LAST_LOSSES = 10
LINES_OF_A_FAILURE = 20


class Results:
    """``results.jsonl``: a line for each run that has ended, appended as soon as it has."""

    def __init__(self, path: Path) -> None:
        """
        Args:
            path: of the file, which need not exist.
        """
        self._path = path

    def rows(self) -> dict[str, dict[str, Any]]:
        """What is noted, by key; a line that a kill cut off, or that is no result, is not, and its run is missing."""
        found: dict[str, dict[str, Any]] = {}
        if not self._path.exists():
            return found
        for line in self._path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if _is_result(row):
                found[row["key"]] = row
        return found

    def append(self, row: dict[str, Any]) -> None:
        """Write a line, on one of its own whatever is at the end of the file."""
        with self._path.open("ab+") as file:
            if file.seek(0, 2):
                file.seek(-1, 2)
                torn = file.read(1) != b"\n"
            else:
                torn = False
            file.write(b"\n" * torn + json.dumps(row, allow_nan=False).encode() + b"\n")


def _is_result(row: Any) -> bool:
    """Whether a line has what the table is made of, in the types that it is written in."""
    if not isinstance(row, dict) or not isinstance(row.get("key"), str) or not isinstance(row.get("curve"), list):
        return False
    pairs = [
        point for point in row["curve"] if isinstance(point, list) and len(point) == 2 and all(map(_number, point))
    ]
    scores = [row.get(name, "") for name in ("perplexity", "test_perplexity")]
    speed = row.get("tokens_per_second")
    return len(pairs) == len(row["curve"]) and all(v is None or _number(v) for v in (*scores, speed))


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def score(row: Mapping[str, Any]) -> float:
    """A run's perplexity on the text that rates are chosen by; infinite where it diverged, which JSON cannot say."""
    return math.inf if row["perplexity"] is None else float(row["perplexity"])


def test_score(row: Mapping[str, Any]) -> float:
    """A run's perplexity on the text that nothing was chosen by; infinite where it diverged."""
    return math.inf if row["test_perplexity"] is None else float(row["test_perplexity"])


def best_run(grid: Iterable[Run], rows: Mapping[str, Mapping[str, Any]]) -> Run | None:
    """Of a method's grid the run with the lowest perplexity, of equal ones the first; None while any is missing."""
    runs = list(grid)
    if any(run.key not in rows for run in runs):
        return None
    return min(runs, key=lambda run: score(rows[run.key]))


def result(one: Run, folder: RunFolder, ended: Ended) -> dict[str, Any]:
    """What is noted of a run.

    Args:
        one: the run.
        folder: what the launcher wrote.
        ended: how its process ended.

    Raises:
        UserError: it neither finished nor diverged.
    """
    if ended.code not in (0, USER_ERROR_CODE):
        raise _failure(one, ended)  # what it wrote may end in the middle of a line
    losses, last = _losses(folder.metrics)
    loss = math.nan if last is None else last[1]
    finished = ended.code == 0 and folder.summary.is_file()
    diverged = ended.code == USER_ERROR_CODE and last is not None and (last[2] or not math.isfinite(loss))
    if not finished and not diverged:
        raise _failure(one, ended)
    summary = json.loads(folder.summary.read_text()) if finished else {}
    perplexity, test = summary.get("perplexity", math.inf), summary.get("perplexity_test", math.inf)
    finite = math.isfinite(perplexity) and math.isfinite(test)
    return {
        "method": one.method,
        "rank": one.rank,
        "lr": one.lr,
        "seed": one.seed,
        "perplexity": perplexity if finite else None,
        "test_perplexity": test if finite else None,
        "test_perplexity_galore_compatible": summary.get("perplexity_test_galore_compatible") if finite else None,
        "reason": "finished" if finite else f"diverged: the loss is {loss} at step {0 if last is None else last[0]}",
        "tokens_per_second": summary.get("tokens_per_second"),
        "seconds": round(ended.seconds, 1),
        "last_losses": [loss for _, loss in losses[-LAST_LOSSES:]],
        "curve": _thinned(losses),
        "bytes_per_rank": summary.get("bytes_per_rank"),
        "peak_memory_bytes": summary.get("peak_memory_bytes"),
        "steps": one.inputs["steps"],
        "versions": one.inputs["versions"],
        "ended": time.strftime("%Y-%m-%d %H:%M:%S"),
        "key": one.key,
    }


def _failure(one: Run, ended: Ended) -> UserError:
    lines = ended.log.read_text(encoding="utf-8", errors="replace").splitlines()[-LINES_OF_A_FAILURE:]
    words = "\n".join(f"  {line}" for line in lines)
    return UserError(f"{one.title} failed with exit code {ended.code}; its last lines (of {ended.log}):\n{words}")


def _losses(metrics: Path) -> tuple[list[tuple[float, float]], tuple[int, float, bool] | None]:
    """(tokens, training loss) of every step with a finite one; (step, loss, skipped) of the last step, finite or not.

    A run that was stopped at a step whose update was skipped had too many of those.
    """
    if not metrics.exists():
        return [], None
    history = read_history(metrics)
    last = None
    for row in read_rows(metrics):
        last = (row["step"], row["loss"], "skipped" in row) if "loss" in row else last
    return list(zip(history.tokens.tolist(), history.losses.tolist(), strict=True)), last


def _thinned(losses: list[tuple[float, float]]) -> list[list[float]]:
    """Means over equal shares of the steps, each at its last step's tokens."""
    size = max(1, math.ceil(len(losses) / CURVE_POINTS))
    parts = [losses[start : start + size] for start in range(0, len(losses), size)]
    return [[part[-1][0], round(math.fsum(loss for _, loss in part) / len(part), 5)] for part in parts]
