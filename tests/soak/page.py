"""The page that says what came of all inputs."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import version

from megalr.formatting import markdown_table
from tests.soak.trial import OUTCOMES

VERSIONS_OF = ("torch", "deepspeed", "transformers", "tokenizers", "safetensors")
COLUMNS = ("kind", "tried", *OUTCOMES[:3], "tracebacks", "hangs", *OUTCOMES[5:])
WORDS = """# Reliability

What megalr does with inputs that are wrong. Each goes to a program of its own, in a folder of its own, whose files are
compared before and after.

| column | meaning |
|---|---|
| refused clearly | exit code 2, and one message that names the key, the file, the flag or the variable |
| rightly accepted | the input turned out to be valid: damage to what nobody reads, a spelling that means the same |
| unclear | refused, but the message does not name what is wrong; or refused although it is valid |
| tracebacks | an exception that nobody has worded, or death by a signal |
| hangs | still running after 60 s |
| silently wrong | exit code 0 for an input that is wrong |
| lost | a file that was there before is gone or changed |
"""


def page(counts: Mapping[str, Mapping[str, int]], seed: int, limit: int | None) -> str:
    """Markdown; counts: outcomes by kind."""
    rows = [[kind, *_numbers(found)] for kind, found in counts.items()]
    sums = {outcome: sum(found.get(outcome, 0) for found in counts.values()) for outcome in OUTCOMES}
    rows.append(["all", *_numbers(sums)])
    command = f"python -m tests.soak --seed {seed}" + (f" --limit {limit}" if limit is not None else "")
    versions = ", ".join(f"{name} {version(name)}" for name in VERSIONS_OF)
    table = markdown_table(COLUMNS, rows)
    made = f"Made by `make soak`, which is `{command}`, with Python {platform.python_version()}, {versions}."
    return "\n".join([WORDS, table, "", made, ""])


def _numbers(found: Mapping[str, int]) -> list[str]:
    return [f"{number:,}" for number in (sum(found.values()), *(found.get(outcome, 0) for outcome in OUTCOMES))]
