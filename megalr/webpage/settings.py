"""The section of settings: flags, the JSON, the model, versions; never a key or a password."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from typing import Any

from megalr.config.secrets import is_secret, secrets_in, without_secrets
from megalr.train.lives import lives_of
from megalr.webpage.foreign import escaped
from megalr.webpage.run import Run
from megalr.webpage.tables import card, pairs, table

LONGEST_TEXT = 60_000  # characters of one JSON
MOST_ROWS = 120
HIDDEN = "[hidden]"
SHORTEST_SECRET = 4  # characters: a shorter one would take ordinary words out

_PASSWORD_IN_URL = re.compile(r"(://[^/\s:@]*:)[^/\s@]+@")


def settings_section(run: Run) -> str:
    """The HTML of all settings that ``run.json`` has; empty without one."""
    if not run.settings:
        return ""
    words = secrets_in(run.settings)
    shown = without_secrets(run.settings)
    about = {
        "started": shown.get("started"),
        "processes": shown.get("processes"),
        "device": shown.get("device"),
        "Python": shown.get("python"),
        **_mapping(shown.get("versions")),
    }
    flags = {name: value for name, value in _mapping(shown.get("arguments")).items() if value not in (None, False, "")}
    parts = [
        '<div class="grid">',
        _pairs("Environment", about, words),
        _pairs("Flags", flags, words),
        "</div>",
        _lives(run.settings, words),
        _pre("Command", _command(shown.get("command")), words, is_open=True),
        _pre("DeepSpeed JSON", _json(shown.get("deepspeed")), words, is_open=True),
        _pre("Model", _json(shown.get("model")), words),
        _pre("Text", _json(shown.get("data")), words),
    ]
    return "".join(parts)


def _lives(settings: Mapping[str, Any], secrets: set[str]) -> str:
    """A table of the starts of a run that was resumed."""
    lives = lives_of(settings)
    if len(lives) < 2:
        return ""
    rows = [
        [
            escaped(_without(life["started"], secrets)),
            f"{life['processes']:,}",
            f"{life['from_update']:,}",
            "" if life["to_update"] is None else f"{life['to_update']:,}",
            escaped(_without(life["ended"] or "", secrets)),
        ]
        for life in lives[-MOST_ROWS:]
    ]
    note = "" if len(lives) <= MOST_ROWS else f"The last {MOST_ROWS} of {len(lives):,}."
    columns = ["started", "processes", "after update", "to update", "ended"]
    return card("lives", "Lives of the run", table(columns, rows, text={0, 4}), note)


def comparable(settings: Mapping[str, Any]) -> dict[str, str]:
    """Dotted keys and values of a run's settings, without secrets."""
    secrets = secrets_in(settings)
    return {key: _without(value, secrets) for key, value in _flat(settings).items()}


def _flat(settings: Any, prefix: str = "") -> dict[str, str]:
    if isinstance(settings, dict) and settings:
        found: dict[str, str] = {}
        for key, value in settings.items():
            if not is_secret(key, value):
                found |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
        return found
    return {prefix: settings if isinstance(settings, str) else json.dumps(settings)}


def _command(command: Any) -> str:
    """The command line, values of flags that name a secret left out."""
    if not isinstance(command, str):
        return ""
    try:
        words = shlex.split(command)
    except ValueError:  # an open quotation mark
        words = command.split()
    shown = []
    hide_next = False
    for word in (word for word in words if "--local_rank" not in word):  # a launcher's, which nobody writes
        name, equals, value = word.partition("=")
        is_name = is_secret(name.lstrip("-"), "text") and (name.startswith("-") or bool(equals))
        shown.append(HIDDEN if hide_next else f"{name}={HIDDEN}" if is_name and equals else word)
        hide_next = is_name and not equals and not hide_next
    return " ".join(word if HIDDEN in word else shlex.quote(word) for word in shown)


def _json(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) if isinstance(content, dict) and content else ""


def _mapping(content: Any) -> Mapping[str, Any]:
    return content if isinstance(content, dict) else {}


def _without(text: str, secrets: set[str]) -> str:
    """Text in which secrets that stand elsewhere in the settings do not occur."""
    for secret in sorted(secrets, key=len, reverse=True):
        if len(secret) >= SHORTEST_SECRET:
            text = text.replace(secret, HIDDEN)
    return _PASSWORD_IN_URL.sub(rf"\1{HIDDEN}@", text)


def _pairs(title: str, values: Mapping[str, Any], secrets: set[str]) -> str:
    rows = []
    for name, value in list(values.items())[:MOST_ROWS]:
        if value is not None:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            rows.append((name, _without(text, secrets)))
    return card(title.lower(), title, pairs(rows)) if rows else ""


def _pre(title: str, text: str, secrets: set[str], *, is_open: bool = False) -> str:
    if not text:
        return ""
    cut = "" if len(text) <= LONGEST_TEXT else f'<p class="note">The first {LONGEST_TEXT:,} characters.</p>'
    shown = escaped(_without(text, secrets), LONGEST_TEXT)
    return f"<details{' open' if is_open else ''}><summary>{title}</summary>{cut}<pre>{shown}</pre></details>"
