"""Bad inputs to all entry points, and a table of what came of them.

python -m tests.soak docs/reliability.md
python -m tests.soak --kind "JSON values" --limit 50 --seed 7
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

from tests.soak.kinds import KINDS
from tests.soak.page import page
from tests.soak.trial import FINE, Case, Kind, Tried, attempt
from tests.soak.workshop import prepare

SHOWN = 1500  # characters of what a failing program printed
JOBS = 2


def main(argv: Sequence[str]) -> int:
    """Try the inputs that the command line asks for; the exit code is 1 where one was not answered as it should be."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("page", nargs="?", type=Path, help="where to write the table as a page")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of inputs and of random damage")
    parser.add_argument("--kind", action="append", choices=[kind.name for kind in KINDS], help="this kind alone")
    parser.add_argument("--limit", type=int, help="at most so many inputs of a kind")
    parser.add_argument("--jobs", type=int, default=JOBS, help="programs at a time")
    arguments = parser.parse_args(argv)
    kinds = [kind for kind in KINDS if not arguments.kind or kind.name in arguments.kind]
    began = time.monotonic()
    counts: dict[str, Counter[str]] = {kind.name: Counter() for kind in kinds}
    for tried in soak(chosen(kinds, arguments.seed, arguments.limit), arguments.jobs):
        counts[tried.kind][tried.outcome] += 1
        if tried.outcome not in FINE:
            print(described(tried), flush=True)
    table = page(counts, arguments.seed, arguments.limit)
    print(f"{table}\n{time.monotonic() - began:.0f} s")
    if arguments.page is not None:
        arguments.page.write_text(table, encoding="utf-8")
    return int(any(outcome not in FINE for found in counts.values() for outcome in found))


def chosen(kinds: Sequence[Kind], seed: int, limit: int | None) -> list[tuple[str, Case]]:
    """The inputs to try: the same for the same seed."""
    found = []
    for kind in kinds:
        rng = Random(f"{seed} {kind.name}")
        cases = list(kind.cases(rng))
        if limit is not None and len(cases) > limit:
            cases = rng.sample(cases, limit)
        found += [(kind.name, case) for case in cases]
    return found


def soak(cases: Sequence[tuple[str, Case]], jobs: int = JOBS) -> Iterator[Tried]:
    """Try each input, and yield what came of it, in their order."""
    with tempfile.TemporaryDirectory(prefix="soak-") as name, ThreadPoolExecutor(jobs) as pool:
        workshop, trials = Path(name, "workshop"), Path(name, "trials")
        workshop.mkdir()
        trials.mkdir()
        prepare(workshop, {name for _, case in cases for name in case.needs})

        def one(index: int) -> Tried:
            return attempt(*cases[index], workshop, trials / str(index))

        yield from pool.map(one, range(len(cases)))


def described(tried: Tried) -> str:
    """An input that was not answered as it should be, so that one can repeat it."""
    case = tried.case
    lines = [f"--- {tried.outcome}: {tried.kind}: {case.about}", f"python {' '.join(case.words)}"]
    if case.env:
        lines.append(f"with {dict(case.env)}")
    lines += [f"{name}: {content[:400]!r}" for name, content in case.files.items()]
    return "\n".join([*lines, f"expected {case.expect}, named {case.names}", tried.printed[-SHOWN:].strip()])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
