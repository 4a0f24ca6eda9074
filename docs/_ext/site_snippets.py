"""The code in README.md and docs: blocks of JSON, Python and shell, and what checks each.

- JSON: parsed, and given to ``MegalrConfig`` if it has an "optimizer" or a "megalr" section. A block may be members of
  an object without the braces.
- Python: compiled. After a comment ``<!-- run -->``, the block runs; those of a page run in order, in one namespace.
- Shell: command lines of megalr's programs are parsed by the programs' own parsers.

A comment ``<!-- not checked: why -->`` before a block leaves it out. Both comments are invisible on a rendered page.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import site_programs

from megalr.config.settings import MegalrConfig
from megalr.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^(?P<indent> *)(?P<fence>`{3,}|~{3,})(?P<language>[^\n`]*)$")
COMMENT = re.compile(r"^\s*<!--\s*(?P<text>.*?)\s*-->\s*$")
SHELLS = ("", "sh", "bash", "shell", "console")
LAUNCHERS = {"deepspeed", "torchrun"}
# Flags of the launchers, with how many words of their own each takes.
LAUNCHER_FLAGS = {
    "deepspeed": {
        "--num_gpus": 1,
        "--num_accelerators": 1,
        "--num_nodes": 1,
        "--master_port": 1,
        "--master_addr": 1,
        "--hostfile": 1,
        "--include": 1,
        "--exclude": 1,
        "--launcher": 1,
        "--no_ssh": 0,
        "--node_rank": 1,
        "--bind_cores_to_rank": 0,
    },
    "torchrun": {
        "--nproc_per_node": 1,
        "--nproc-per-node": 1,
        "--nnodes": 1,
        "--node_rank": 1,
        "--node-rank": 1,
        "--master_addr": 1,
        "--master-addr": 1,
        "--master_port": 1,
        "--master-port": 1,
        "--rdzv_backend": 1,
        "--rdzv-backend": 1,
        "--rdzv_endpoint": 1,
        "--rdzv-endpoint": 1,
        "--rdzv_id": 1,
        "--rdzv-id": 1,
        "--max_restarts": 1,
        "--max-restarts": 1,
        "--signals-to-handle": 1,
        "--standalone": 0,
    },
}


@dataclass(frozen=True)
class Snippet:
    """A fenced block.

    Attributes:
        page: its file, relative to the repository.
        line: of the fence, counted from 1.
        language: the first word behind the fence; a directive of MyST is in braces.
        text: what stands between the fences.
        note: the comment on the line before; empty without one.
    """

    page: str
    line: int
    language: str
    text: str
    note: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def runs(self) -> bool:
        """Whether the block is run."""
        return self.note == "run"

    @property
    def is_checked(self) -> bool:
        """Whether anything looks at the block."""
        return not self.note.startswith("not checked:")


def pages() -> list[str]:
    """README.md and every page of docs, relative to the repository."""
    found = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [path.relative_to(ROOT).as_posix() for path in found]


def snippets(page: str) -> Iterator[Snippet]:
    """The fenced blocks of a page."""
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    index = 0
    while index < len(lines):
        opening = FENCE.match(lines[index])
        index += 1
        if opening is None:
            continue
        start, indent = index, len(opening["indent"])
        while index < len(lines) and not _closes(lines[index], opening["fence"]):
            index += 1
        text = "\n".join(line[indent:] for line in lines[start:index])
        before = COMMENT.match(lines[start - 2]) if start >= 2 else None
        language = opening["language"].strip().split(" ")[0]
        yield Snippet(page, start, language, text, before["text"] if before else "")
        index += 1


def _closes(line: str, fence: str) -> bool:
    words = line.strip()
    return words.startswith(fence) and not words.strip(fence[0])


def fault_of_json(snippet: Snippet) -> str:
    """What is wrong with a block of JSON; empty if nothing is."""
    text = snippet.text.strip()
    try:
        content = json.loads(text if text.startswith("{") else f"{{{text}}}")
        if isinstance(content, dict) and ("optimizer" in content or "megalr" in content) and _has_plugins(content):
            MegalrConfig.from_json(content)
    except (json.JSONDecodeError, UserError) as error:
        return f"{snippet}: {error}"
    return ""


def _has_plugins(content: dict[str, Any]) -> bool:
    """Whether the files of the plugins that a JSON names are there; a reader's own, such as my_rules.py, are not."""
    section = content.get("megalr", {})
    files = [name for name in section.get("plugins", ()) if name.endswith(".py")] if isinstance(section, dict) else []
    return all((ROOT / name).is_file() for name in files)


def commands(snippet: Snippet) -> Iterator[list[str]]:
    """The command lines of a block, as words; a line that ends with a backslash goes on."""
    for line in snippet.text.replace("\\\n", " ").splitlines():
        bare = line.strip().removeprefix("$ ").strip()
        if bare and not bare.startswith("#"):
            try:
                words = shlex.split(bare, comments=True)
            except ValueError:  # a string that goes on in the next line is no command of ours
                continue
            yield _without_settings(words)


def _without_settings(words: list[str]) -> list[str]:
    while words and re.fullmatch(r"[A-Za-z_]\w*=.*", words[0]):
        words = words[1:]
    return words


def fault_of_command(words: list[str]) -> str | None:
    """What is wrong with a command line of ours; empty if nothing is, None if it is not one of ours."""
    program, arguments = program_of(words)
    if program is None:
        return None
    if program.startswith("?"):
        return f"{' '.join(words)}: {program[1:]}"
    if any(re.search(r"\.\.\.|[$(){}]", word) for word in arguments):  # a placeholder, or the shell's own
        return None
    parser = site_programs.parser_of(program)
    if "--plugins" in arguments:  # which would be imported, and add choices: flags alone are looked at
        known = {flag for action in parser._actions for flag in action.option_strings}
        unknown = [word for word in arguments if word.startswith("--") and word.partition("=")[0] not in known]
        return f"{' '.join(words)}: there is no {unknown[0]}" if unknown else ""
    launch = site_programs.launch_parser() if program == "megalr pretrain" else None
    try:
        arguments = arguments if launch is None else launch.parse_known_args(arguments)[1]
        parser.parse_args(arguments)
    except (UserError, SystemExit, argparse.ArgumentError) as error:
        return f"{' '.join(words)}: {error}"
    return ""


def program_of(words: list[str]) -> tuple[str | None, list[str]]:
    """The program that a command line starts, and its arguments; None for one that is not megalr's."""
    if not words:
        return None, []
    first, rest = words[0], words[1:]
    if first in LAUNCHERS:
        return _launched(first, rest)
    if first in ("python", "python3"):
        return _python(rest)
    if first == "megalr":
        name = " ".join(words[:2])
        if len(words) == 1 or rest[0].startswith("-"):
            return None, []
        return (name, words[2:]) if name in site_programs.programs() else ("?megalr has no such command", [])
    return None, []


def _python(words: list[str]) -> tuple[str | None, list[str]]:
    """What an interpreter starts."""
    if words[:1] != ["-m"]:
        return _script(words[0], words[1:]) if words else (None, [])
    module, arguments = words[1], words[2:]
    if module == "deepspeed.launcher.runner":
        return _launched("deepspeed", arguments)
    return (module, arguments) if module in site_programs.programs() else (None, [])


def _launched(launcher: str, words: list[str]) -> tuple[str | None, list[str]]:
    """What a launcher starts."""
    flags, index = LAUNCHER_FLAGS[launcher], 0
    while index < len(words) and words[index].startswith("-"):
        name, has_value, _ = words[index].partition("=")
        if name in ("--module", "-m"):
            module = words[index + 1]
            known = site_programs.programs()
            return (module, words[index + 2 :]) if module in known else (None, [])
        if name not in flags:
            return f"?{launcher} has no flag {name} that is known here", []
        index += 1 + (0 if has_value else flags[name])
    return _script(words[index], words[index + 1 :]) if index < len(words) else (None, [])


def _script(script: str, arguments: list[str]) -> tuple[str | None, list[str]]:
    if script in site_programs.programs():
        return script, arguments
    if script.startswith(("launchers/", "examples/", "benchmarks/", "tests/")) and not (ROOT / script).is_file():
        return f"?there is no {script}", []
    return None, []
