"""What is no file, where a run, a checkpoint or an export has one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

from tests.soak.folders import EXPORT, INSPECT, PRETRAIN, RESUME, SCORE, STEP, VERIFY
from tests.soak.trial import Case
from tests.soak.workshop import EVALUATE, SIZES

NEW = (PRETRAIN, *SIZES, "--deepspeed", "good.json", "--steps", "1")
OVERWRITE = (*NEW, "--output", "run", "--overwrite")
SCORE_EXPORT = (EVALUATE, "export", "--dataset", "text.txt", "--sequence-length", "32")
OF_A_RUN = ("run.json", "metrics.jsonl", "summary.json", "routing.txt", "loss.png", "checkpoints", "checkpoints/latest")
OF_A_CHECKPOINT = ("manifest.json", "rank-00000.safetensors")
OF_AN_EXPORT = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors", "generation_config.json")
NEEDLESS = (": missing", ": a file that cannot be read")
LATEST = ("", "\n", "step9", "..", "/etc", "step1/../step1", "\x00", "\ud7ff" * 5000, "x" * 300)


def no_files(rng: Random) -> Iterator[Case]:
    """Each file of a folder replaced by each thing that is none; programs may do without what they do not need."""
    for name in OF_A_RUN:
        expect = "bad" if name != "checkpoints" else "either"
        for case in _cases(f"overwrite: {name}", OVERWRITE, f"run/{name}", expect):
            if not case.about.endswith(NEEDLESS):  # else the run is overwritten, as it should be
                yield case
    for program, words in {"resume": RESUME, "evaluate": SCORE}.items():
        for name in OF_A_RUN:
            expect = "bad" if (program, name) == ("evaluate", "run.json") else "either"
            yield from _cases(f"{program}: {name}", words, f"run/{name}", expect)
        for text in LATEST:
            yield _case(f"{program}: latest says {text[:9]!r}", words, "run/checkpoints/latest", _with(text), "either")
        for name in OF_A_CHECKPOINT:
            yield from _cases(f"{program}: {name}", words, f"{STEP}/{name}", "either", says=("step2",))
    for program, words in {"verify": VERIFY, "inspect": INSPECT, "export": EXPORT}.items():
        for name in OF_A_CHECKPOINT:
            needed = program != "inspect" or name == "manifest.json"
            yield from _cases(f"{program}: {name}", words, f"{STEP}/{name}", "bad" if needed else "either")
    for name in OF_AN_EXPORT:
        needed = name in ("config.json", "tokenizer.json", "model.safetensors")
        yield from _cases(f"export: {name}", SCORE_EXPORT, f"export/{name}", "bad" if needed else "either")
    for name in (
        "loss.png",
        "routing.txt",
        "tensorboard/x",
        "csv_monitor/x",
        "profile/x",
        "summary.json",
        "metrics.jsonl",
    ):
        for flags in ((), ("--overwrite",), ("--resume",)):
            yield Case(
                about=f"train without --output {flags}: {name}",
                words=(*NEW, *flags),
                names=("runs/good",),
                files={f"runs/good/{name}": "mine"},
                expect="either",
            )
    del rng


def _cases(about: str, words: tuple[str, ...], place: str, expect: str, says: tuple[str, ...] = ()) -> Iterator[Case]:
    for kind, make in KINDS.items():
        yield _case(f"{about}: {kind}", words, place, make, expect, says)


def _case(
    about: str,
    words: tuple[str, ...],
    place: str,
    make: Callable[[Path], object],
    expect: str,
    says: tuple[str, ...] = (),
) -> Case:
    def prepare(folder: Path) -> None:
        path = folder / place
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        make(path)

    return Case(
        about=about,
        words=words,
        names=(Path(place).name, "step2", place, *(("export",) if words is SCORE_EXPORT else ())),
        needs=(place.partition("/")[0],),
        prepare=prepare,
        expect=expect,  # type: ignore[arg-type]
        says=says,
        writes="run",
        damage_code=1 if words is VERIFY else None,
    )


def _with(text: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(text)


def _full_folder(path: Path) -> None:
    path.mkdir()
    (path / "mine").write_text("mine")


def _nothing(path: Path) -> None:
    del path


KINDS: dict[str, Callable[[Path], object]] = {
    "missing": _nothing,
    "a folder": os.mkdir,
    "a full folder": _full_folder,
    "a FIFO": os.mkfifo,
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a device without end": lambda path: path.symlink_to("/dev/zero"),
    "a file that cannot be read": lambda path: path.symlink_to("/proc/self/mem"),
}
