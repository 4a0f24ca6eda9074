"""The lives of a run: from each of its starts to the end that came, as ``run.json`` lists them under ``"lives"``."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megalr.config import text
from megalr.errors import UserError
from megalr.train.run_folder import write_json

logger = logging.getLogger(__name__)

KEY = "lives"
KILLED = "did not say: killed, or stopped before its first update"
FINISHED = "finished"
LONGEST_REASON = 200  # characters
_LARGEST = 1 << 63
MOST_LIVES = 10_000  # that are kept; the oldest go
# Of a life: its keys and their types. The last two are null while it lasts, and to_update also where nothing tells it.
_TYPES = {
    "started": str,
    "processes": int,
    "from_update": int,
    "to_update": int | None,
    "ended": str | None,
}


def lives_of(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The lives that ``run.json`` lists, the first one first; what is damaged is left out.

    Args:
        settings: its content. One of an older version tells of the last life alone, whose first update it does not say.
    """
    found = settings.get(KEY)
    if isinstance(found, list):
        lives = [{key: each[key] for key in _TYPES} for each in found if _is_life(each)]
        return lives[-MOST_LIVES:]
    old = {"from_update": 0, "to_update": None, "ended": None} | {
        key: settings.get(key) for key in ("started", "processes")
    }
    return [old] if _is_life(old) else []


def lives_before(path: Path, last_update: int | None) -> list[dict[str, Any]]:
    """The lives of a run that is about to go on.

    Args:
        path: of its ``run.json``, which may be damaged or missing.
        last_update: that it has noted; what a killed life has come to.
    """
    try:
        lives = lives_of(text.read(path))
    except UserError:
        return []
    if lives and lives[-1]["ended"] is None:
        lives[-1] |= {"to_update": last_update, "ended": KILLED}
    return lives


def new_life(started: str, processes: int, update: int) -> dict[str, Any]:
    """A life that begins, after so many updates."""
    return {"started": started, "processes": processes, "from_update": update, "to_update": None, "ended": None}


def end_life(path: Path, update: int, reason: str) -> None:
    """Write how the last life has ended; a disk that is full keeps nobody from ending.

    Args:
        path: of ``run.json``.
        update: the last one that was made.
        reason: such as "SIGTERM", or a message, of which the first line is kept.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        words = reason.splitlines()[0][:LONGEST_REASON] if reason else ""
        content[KEY][-1] |= {"to_update": update, "ended": words}
        write_json(path, content)
    except (OSError, ValueError, LookupError, TypeError) as error:
        logger.warning("%s cannot be told how the run has ended: %s", path, error)


def _is_life(each: Any) -> bool:
    return isinstance(each, dict) and all(
        key in each and isinstance(each[key], kind) and not _is_no_number(each[key]) for key, kind in _TYPES.items()
    )


def _is_no_number(value: Any) -> bool:
    """Whether Python takes it for a whole number, and no run has counted so far."""
    return isinstance(value, bool) or (isinstance(value, int) and not 0 <= value < _LARGEST)
