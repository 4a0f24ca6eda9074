"""Plant faults, one at a time, and see whether the daily tests notice: ``make mutants``, or

    python -m tests.mutants [--area AREA] [--only TEXT] [--first] [--jobs N] [--output FILE] [--logs FOLDER]
    python -m tests.mutants --check

Each fault goes into a copy of this folder. There the few tests that should notice it run first, then the daily tests of
its area. A table says which test noticed, and ends with the survivors. A fault that no test notices is a gap: give it a
test, or, where it changes nothing that anyone could see, another fault.

``--area`` and ``--only`` may be given several times. With ``--first`` the daily tests of the areas are left out;
run the survivors of that again without it.

``--check`` runs nothing: it says which faults no longer fit the code. The code that a fault replaces must occur exactly
once in its file; when it has moved or changed, move the fault with it.

A comparison of two suites is two runs of this tool, one in each tree, each with the faults' paths and code as they are
there; ``--tree`` names another tree than this one.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import os
import queue
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from megalr.processes import die_with_parent
from tests.mutants.areas import AREAS, MUTANTS
from tests.mutants.mutant import Mutant

ROOT = Path(__file__).parents[2]
IGNORED = ("*.pyc", "__pycache__", ".git", ".venv", ".venv-cuda", "runs", "build", "dist", "*_cache", "*.egg-info")
PYTEST = ("-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", "not slow")
FAILED = re.compile(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", re.MULTILINE)
NOTHING_SELECTED = (4, 5)  # pytest's exit codes: no such file, no such test
LIMIT = {"first": 600.0, "daily": 3000.0}  # seconds; a fault that makes ranks wait for each other has been noticed


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant.

    Attributes:
        mutant: which.
        noticed_by: the test, and in which selection; empty for a survivor.
        seconds: of all its runs.
    """

    mutant: Mutant
    noticed_by: str
    seconds: float


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0 if every mutant was noticed."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--area", action="append", choices=AREAS, help="only these areas")
    parser.add_argument("--only", action="append", help="only mutants whose name contains this")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time")
    parser.add_argument("--output", type=Path, help="write the table there as well, after each mutant")
    parser.add_argument("--logs", type=Path, help="keep what pytest printed in this folder")
    parser.add_argument("--tree", type=Path, default=ROOT, help="which tree to test")
    parser.add_argument("--first", action="store_true", help="leave out the daily tests of the areas")
    parser.add_argument("--check", action="store_true", help="run nothing; say which mutants are stale")
    given = parser.parse_args(arguments)
    chosen = [
        m
        for m in MUTANTS
        if m.area in (given.area or AREAS) and (not given.only or any(text in m.name for text in given.only))
    ]
    stale = [problem for mutant in chosen if (problem := staleness(mutant, given.tree))]
    print("".join(f"{problem}\n" for problem in stale), end="", file=sys.stderr)
    if stale or given.check:
        print(f"{len(chosen) - len(stale)} of {len(chosen)} mutants fit the code")
        return 1 if stale else 0
    steps = ("first",) if given.first else ("first", "daily")
    outcomes = run_all(chosen, steps, given.tree, given.jobs, given.output, given.logs)
    print(table(outcomes))
    return 0 if all(outcome.noticed_by for outcome in outcomes) else 1


def staleness(mutant: Mutant, tree: Path) -> str:
    """Why a mutant cannot be planted; empty if it can."""
    path = tree / mutant.file
    if not path.is_file():
        return f"stale: {mutant.area}: {mutant.name}: there is no {mutant.file}"
    text = path.read_text()
    if text.count(mutant.find) != 1:
        return (
            f"stale: {mutant.area}: {mutant.name}: {mutant.file} has it {text.count(mutant.find)} times:\n{mutant.find}"
        )
    try:
        ast.parse(text.replace(mutant.find, mutant.replace))
    except SyntaxError as error:
        return f"broken: {mutant.area}: {mutant.name}: {error}"
    return ""


def run_all(
    chosen: list[Mutant], steps: tuple[str, ...], tree: Path, jobs: int, output: Path | None, logs: Path | None
) -> list[Outcome]:
    """Each mutant in one of as many copies of the tree as there are jobs."""
    outcomes: list[Outcome] = []
    done = threading.Lock()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copies: queue.Queue[Path] = queue.Queue()
        for job in range(jobs):
            copies.put(copy_of(tree, Path(folder) / f"copy {job}"))

        def one(mutant: Mutant) -> None:
            copy = copies.get()
            try:
                outcome = run(mutant, steps, copy, logs)
            finally:
                copies.put(copy)
            with done:
                outcomes.append(outcome)
                by = outcome.noticed_by or "SURVIVES"
                print(f"{len(outcomes)}/{len(chosen)} {mutant.area}: {mutant.name}: {by}", file=sys.stderr, flush=True)
                if output is not None:
                    output.write_text(table(outcomes) + "\n")

        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(one, chosen))
    return sorted(outcomes, key=lambda outcome: chosen.index(outcome.mutant))


def copy_of(tree: Path, place: Path) -> Path:
    """A copy that a fault can be planted in; the virtual environment is shared."""
    shutil.copytree(tree, place, ignore=shutil.ignore_patterns(*IGNORED), symlinks=True)
    (place / ".venv").symlink_to((tree / ".venv").resolve())
    return place


def run(mutant: Mutant, steps: tuple[str, ...], copy: Path, logs: Path | None) -> Outcome:
    """Plant a mutant, run its tests until one fails, put the code back."""
    path = copy / mutant.file
    before = path.read_text()
    write(path, before.replace(mutant.find, mutant.replace))
    began, name, printed = time.monotonic(), "", ""
    try:
        for step in steps:
            selection = mutant.first if step == "first" else AREAS[mutant.area]
            code, text = pytest(copy, shlex.split(selection), LIMIT[step])
            printed += text
            if code in NOTHING_SELECTED:
                printed += f"\nnothing selected by {selection}\n"
                print(f"{mutant.area}: {mutant.name}: no test is selected by {selection}", file=sys.stderr)
            elif code:
                found = FAILED.search(text)
                ended = "a run that hangs" if code == -signal.SIGKILL else f"pytest ended with {code}"
                name = f"{found[1] if found else ended} ({step})"
                break
    finally:
        write(path, before)
    if logs is not None:
        logs.mkdir(parents=True, exist_ok=True)
        (logs / f"{re.sub(r'[^A-Za-z0-9]+', '-', f'{mutant.area} {mutant.name}')}.log").write_text(printed)
    return Outcome(mutant, name, time.monotonic() - began)


def write(path: Path, text: str) -> None:
    """Write a module, and forget what was compiled of it: what changes twice in a second looks unchanged."""
    path.write_text(text)
    for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
        compiled.unlink()


def pytest(copy: Path, selection: list[str], limit: float) -> tuple[int, str]:
    """Run some tests in a copy; the exit code, -9 if the time was up, and what was printed.

    Raises:
        RuntimeError: somebody else has ended pytest, which says nothing about the mutant.
    """
    process = subprocess.Popen(
        [sys.executable, *PYTEST, *selection],
        cwd=copy,
        env={**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=die_with_parent(),  # noqa: PLW1509  (as in the tests' harness)
    )
    try:
        text, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the processes of its tests end with it
        text, _ = process.communicate()
        return -signal.SIGKILL, text
    if process.returncode < 0:
        raise RuntimeError(f"pytest {shlex.join(selection)} was ended from outside, by signal {-process.returncode}")
    return process.returncode, text


def table(outcomes: list[Outcome]) -> str:
    """Markdown: every mutant, and the survivors again."""
    lines = ["| Area | Mutant | Killed by | Seconds |", "|---|---|---|---|"]
    for o in outcomes:
        by = f"`{o.noticed_by}`" if o.noticed_by else "**survives**"
        lines.append(f"| {o.mutant.area} | {o.mutant.name} | {by.replace('|', '/')} | {o.seconds:.0f} |")
    survivors = [f"- {o.mutant.area}: {o.mutant.name}" for o in outcomes if not o.noticed_by]
    killed = len(outcomes) - len(survivors)
    return "\n".join(
        [*lines, "", f"Killed: {killed} of {len(outcomes)}.", *(["Survivors:", ""] if survivors else []), *survivors]
    )


if __name__ == "__main__":
    sys.exit(main())
