"""One input, tried: the program that gets it is forked, in a folder of its own, and what it does is put into a word."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Literal

from tests.processes import ProcessError, run

LIMIT_S = 60.0  # a refusal takes less than a second; a machine that is busy more
REFUSED, CODE = "error: ", 2

# In the order of the table's columns; from the third on each is a failure.
Outcome = Literal["refused clearly", "rightly accepted", "unclear", "traceback", "hang", "silently wrong", "lost"]
OUTCOMES: tuple[Outcome, ...] = (
    "refused clearly",
    "rightly accepted",
    "unclear",
    "traceback",
    "hang",
    "silently wrong",
    "lost",
)
FINE = OUTCOMES[:2]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One input.

    Attributes:
        about: the input in words, for whoever repeats it.
        words: what follows ``python`` on the command line.
        names: a refusal names one of these: the key, the file or the flag. Letter case does not count.
        expect: whether the input is "bad", "good", or what its owner may mean ("either"), so that no answer is wrong
            but a traceback, a wait or a loss.
        says: where a program goes on all the same, it names one of these, such as a checkpoint that it passes over.
        files: what is written into the folder, by name.
        prepare: does the rest in the folder, such as damage to a file.
        needs: prepared things that it starts from; see :func:`tests.soak.workshop.prepare`.
        env: variables to set; None takes one away.
        damage_code: with which the program says that something is damaged, in place of an error.
        writes: the folder that is the program's to change unless it refuses the input; its checkpoints stay.
    """

    about: str
    words: tuple[str, ...]
    names: tuple[str, ...] = ()
    expect: Literal["bad", "good", "either"] = "bad"
    says: tuple[str, ...] = ()
    files: Mapping[str, str | bytes] = field(default_factory=dict)
    prepare: Callable[[Path], object] | None = None
    needs: tuple[str, ...] = ()
    env: Mapping[str, str | None] = field(default_factory=dict)
    damage_code: int | None = None
    writes: str | None = None


@dataclass(frozen=True)
class Kind:
    """Inputs of one kind.

    Attributes:
        name: of its row in the table.
        cases: makes them, the same for the same random numbers.
    """

    name: str
    cases: Callable[[Random], Iterable[Case]]


@dataclass(frozen=True)
class Tried:
    """What came of an input; ``printed`` is the program's output, and what is gone."""

    kind: str
    case: Case
    outcome: Outcome
    printed: str


def attempt(kind: str, case: Case, workshop: Path, folder: Path, limit: float = LIMIT_S) -> Tried:
    """Run a case's program in a new folder.

    Args:
        kind: the name of its kind.
        case: the input.
        workshop: where prepared things are.
        folder: is made, and deleted.
        limit: seconds after which it hangs.
    """
    folder.mkdir()
    try:
        for name in ("small.json", "text.txt", "good.json", *case.needs):
            _copy(workshop / name, folder / name)
        for name, content in case.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        if case.prepare is not None:
            case.prepare(folder)
        before = _marks(folder)
        env = {**ALONE, "MEGALR_CACHE": str(workshop / "cache"), **case.env}
        try:
            done = run([sys.executable, *case.words], check=False, limit=limit, cwd=folder, env=env, warm=True)
        except ProcessError as error:
            return Tried(kind, case, "hang", str(error))
        after = _marks(folder)
        own = case.writes if done.code != CODE else None
        lost = sorted(n for n, mark in before.items() if after.get(n) != mark and not _is_in(n, own))
        if lost:
            return Tried(kind, case, "lost", f"changed or gone: {', '.join(lost)}\n{done.output}")
        return Tried(kind, case, judged(case, done.code, done.output), f"exit code {done.code}\n{done.output}")
    finally:
        _delete(folder)


# As in a shell of somebody who has started nothing yet.
ALONE: dict[str, str | None] = {
    **dict.fromkeys(("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_SIZE", "MAKEFLAGS")),
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
}


def judged(case: Case, code: int, output: str) -> Outcome:
    """The word for what a program answered with."""
    if "Traceback (most recent call last)" in output or code not in (0, CODE, case.damage_code):
        return "traceback"
    if code == 0:
        said = not case.says or any(name in output for name in case.says)
        return "rightly accepted" if said and case.expect != "bad" else "silently wrong"
    message = output[output.find(REFUSED) :].lower()
    named = not case.names or any(name.lower() in message for name in case.names)
    clear = code == case.damage_code or (REFUSED in output and named)
    return "refused clearly" if clear and case.expect != "good" else "unclear"


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, symlinks=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)


def _marks(folder: Path) -> dict[str, str]:
    """Every file below a folder, and a hash of what is in it; of other things what they are."""
    found = {}
    for path in sorted(folder.rglob("*")):
        kind = stat.S_IFMT(path.lstat().st_mode)
        mark = f"{kind:o}"
        if path.is_symlink():
            mark += os.readlink(path)
        elif path.is_file():
            mark += hashlib.sha256(path.read_bytes()).hexdigest() if os.access(path, os.R_OK) else "unreadable"
        found[str(path.relative_to(folder))] = mark
    return found


def _is_in(name: str, folder: str | None) -> bool:
    """Whether a file is in a run's folder and none of its checkpoints."""
    return folder is not None and name.startswith(f"{folder}/") and "/step" not in name


def _delete(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o700)
    shutil.rmtree(folder)
