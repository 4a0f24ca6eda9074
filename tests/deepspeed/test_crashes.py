"""Processes are killed while they save, or find the disk full: there is always a whole checkpoint, the last one."""

from __future__ import annotations

import itertools
import random
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megalr.checkpoint.folders import newest_valid
from megalr.checkpoint.manifest import LATEST, MANIFEST
from tests import known_state, processes
from tests.deepspeed.crashing import BALLAST
from tests.deepspeed.forking import Ended, Forker, Killing
from tests.deepspeed.harness import RankError, run_ranks

pytestmark = pytest.mark.distributed
SAVING = "tests.deepspeed.crashing:saving"
ENGINES = "tests.deepspeed.surviving"
COLUMNS = 5_000  # 2.5 MB, so that writing them takes a good part of a save
# What comes one after another in the same folder.
MODES: dict[str, dict[str, Any]] = {
    "in turn": {"asynchronous": False, "tag": None, "keep": 2},
    "one tag": {"asynchronous": False, "tag": "last", "keep": 1},
    "beside": {"asynchronous": True, "tag": None, "keep": 2},
    "beside, one tag": {"asynchronous": True, "tag": "last", "keep": 1},
}
# What the first process does to the disk when it saves; each is a point to be killed at.
POINTS = {"os.mkdir", "open rank", "fsync", "open manifest", "open .latest", "os.rename", "os.remove", "os.rmdir"}
DAILY = [("in turn", 0, "all"), ("one tag", 0, "one"), ("in turn", 1, "one")]


def _slow_but(daily: list[Any], *choices: Iterable[Any]) -> list[Any]:
    """All combinations, of which a few are for every day."""
    every = itertools.product(*choices)
    return [pytest.param(*each, marks=() if each in daily else pytest.mark.slow) for each in every]


@pytest.fixture(scope="module")
def forker() -> Iterator[Forker]:
    with Forker() as forker:
        yield forker


class Run:
    """A run that goes on from its checkpoints however often it is killed; each start looks at what there is."""

    def __init__(self, forker: Forker, folder: Path) -> None:
        self.folder, self._forker = folder, forker
        self.returned = self.begun = 0  # counts of updates: of the last save that came back, of the last at all

    def go_on(self, world_size: int, updates: int, *, columns: int = known_state.LIGHT, **changes: Any) -> Ended:
        """Start processes; fail unless they had what they should have had, and left what they should have left."""
        folder = str(self.folder)
        ended = self._forker.run(SAVING, world_size, folder, updates, columns=columns, **changes)
        assert not ended.hung, ended
        loaded = ended.of("loaded")
        assert len(loaded) == (world_size if self.returned else len(loaded))
        assert all(self.returned <= each <= self.begun and each == loaded[0] for each in loaded), (self.__dict__, ended)
        assert not any(ended.of("wrong")), ended
        assert not any(ended.of("skipped")), ended
        for rank, code in enumerate(ended.codes):
            assert code in (0, -9) or ended.of("raised", rank), ended
        self.begun = max([*ended.of("begin"), *loaded[:1]], default=self.begun)
        self.returned = max([*ended.of("returned"), *loaded[:1], 0])
        manifest, skipped = newest_valid(self.folder)
        assert skipped == [], ended  # what is not whole does not look like a checkpoint
        if self.returned:
            assert manifest is not None, ended
            assert self.returned <= manifest.updates <= self.begun, (self.__dict__, ended)
            assert known_state.wrong(manifest, columns) == []
            if changes.get("tag") is None:  # else a checkpoint is without its name for a moment
                assert (self.folder / (self.folder / LATEST).read_text() / MANIFEST).is_file()
        return ended

    def finish(self, keep: int, **changes: Any) -> None:
        """Save undisturbed; nothing may be left of what was interrupted."""
        self.go_on(2, 3, keep=keep, **changes)
        names = [path.name for path in self.folder.iterdir()]
        assert len(names) == keep + 1, names
        assert (self.folder / LATEST).read_text().strip() in names


@pytest.fixture
def run(forker: Forker, tmp_path: Path) -> Run:
    return Run(forker, tmp_path / "a folder" / "with spaces")


@pytest.mark.parametrize(("mode", "rank", "killed"), _slow_but(DAILY, MODES, (0, 1), ("all", "one")))
def test_killed_before_each_thing_that_a_save_does_to_the_disk(run, mode, rank, killed):
    how = MODES[mode]
    run.go_on(2, 2, **how)
    (seen,) = run.go_on(2, 2, die=(1, rank, None, False), **how).of("seen")
    if rank == 0:
        assert {point for point in POINTS if any(each.startswith(point) for each in seen)} == POINTS
    for number in range(len(seen)):
        ended = run.go_on(2, 2, die=(1, rank, number, killed == "all"), **how)
        assert ended.codes[rank] == -9, ended
        assert (ended.codes == [-9, -9]) == (killed == "all")
    run.finish(**how)


@pytest.mark.parametrize("mode", ["one tag", "beside, one tag"])
@pytest.mark.parametrize("point", ["os.rename last", "os.rename .last.part"])
def test_killed_while_it_replaces_and_again_before_it_has_written(run, mode, point):
    """What had lost its name when the first save was interrupted is all that there is when the second one is."""
    run.go_on(2, 2, **MODES[mode])
    run.go_on(2, 1, die=(0, 0, point, True), **MODES[mode])
    run.go_on(2, 1, die=(0, 0, "open rank", True), **MODES[mode])
    run.go_on(2, 1, die=(0, 1, "open rank", True), **MODES[mode])
    run.finish(**MODES[mode])


@pytest.mark.parametrize("mode", ["in turn", "beside"])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_when_one_is_killed_the_others_end_with_an_error(run, rank, mode):
    """Before it opens its file, so that none of them can have come through."""
    run.go_on(3, 1, **MODES[mode])
    ended = run.go_on(3, 1, die=(0, rank, "open rank", False), **MODES[mode])
    assert ended.codes == [-9 if each == rank else 1 for each in range(3)]
    assert ended.of("raised") == ["UserError"] * 2
    for message in ended.of("message"):
        assert "step2 may not have been written: processes have lost each other" in message
        assert message.endswith("the newest one is " + str(run.folder / "step1"))


@pytest.mark.parametrize("moments", [6, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_random_moments(run, moments):
    """Evenly over the time that a save takes, each at a random moment of its part."""
    draw = random.Random(moments)
    seconds = {}
    for mode, how in MODES.items():
        for world_size in (2, 3):
            ended = run.go_on(world_size, 3, columns=COLUMNS, **how)
            # Beside the training a save takes from the begin of the call to the end of the next one, which waits.
            seconds[mode, world_size] = min(ended.of("seconds", 0)[1:])
    for number in range(moments):
        mode, world_size = draw.choice(list(seconds))
        moment = seconds[mode, world_size] * (number + draw.random()) / moments
        alone = draw.random() < 0.5
        killed = (draw.randrange(world_size),) if alone else tuple(range(world_size))
        kill = Killing({"begin": run.returned + 2, "rank": 0}, moment, killed)
        run.go_on(world_size, 3, columns=COLUMNS, kill=kill, **MODES[mode])
    run.finish(columns=COLUMNS, **MODES["in turn"])


@pytest.mark.parametrize(
    ("mode", "rank"), _slow_but([("in turn", 1), ("beside", 0)], ("in turn", "one tag", "beside"), (0, 1))
)
def test_a_process_that_cannot_write_its_file(run, rank, mode):
    """As with a quota: no file may be longer than a few bytes."""
    run.go_on(2, 2, columns=COLUMNS, **MODES[mode])
    ended = run.go_on(2, 4, columns=COLUMNS, full=(1, rank, 1000), **MODES[mode])
    _told(run, ended, [f"process {rank}: [Errno 27] File too large"], MODES[mode])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MB."""
    folder = tmp_path / "small disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "none", str(folder)]
    try:
        mounted = processes.run(mount, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if mounted.code:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield folder
    processes.run(["umount", folder])


# Which of a checkpoint's files there is room for.
ROOMS = {
    "no file": [],
    "one file": ["rank-00001.safetensors"],
    "no manifest": ["rank-00000.safetensors", "rank-00001.safetensors"],
    "no name": ["rank-00000.safetensors", "rank-00001.safetensors", "manifest.json"],
}
A_DAY = [("in turn", "no name"), ("one tag", "no manifest"), ("beside", "one file")]
PAGE = 4096  # bytes; what a file takes is a multiple


@pytest.mark.parametrize(("mode", "room"), _slow_but(A_DAY, ("in turn", "one tag", "beside"), ROOMS))
def test_a_full_disk(forker, small_disk, mode, room):
    run = Run(forker, small_disk)
    run.go_on(2, 2, columns=COLUMNS, **MODES[mode])
    newest, _ = newest_valid(small_disk)
    pages = sum(-(-(newest.folder / name).stat().st_size // PAGE) for name in ROOMS[room])
    free = shutil.disk_usage(small_disk).free
    (small_disk / BALLAST).write_bytes(bytes(free - pages * PAGE))
    ended = run.go_on(2, 4, columns=COLUMNS, full=(0, 0, 1 << 30), **MODES[mode])
    _told(run, ended, ["[Errno 28] No space left on device"], MODES[mode])


def _told(run: Run, ended: Ended, causes: list[str], how: dict[str, Any]) -> None:
    """Both say why, nothing is left, and the saves after it have succeeded."""
    assert ended.codes == [0, 0], ended
    messages = ended.of("message")
    assert len(messages) == 2
    assert messages[0] == messages[1]
    for cause in causes:
        assert cause in messages[0]
    assert "could not be written: process" in messages[0]
    before = run.folder / (how["tag"] or f"step{ended.of('failed')[0] - 1 - how['asynchronous']}")
    assert messages[0].endswith(f"Checkpoints written before are as they were: the newest one is {before}")
    assert ended.of("leftovers") == [[], []]
    assert ended.of("returned")[-1] == run.begun
    run.finish(columns=COLUMNS, **how)


# --- engines


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "stage", "who", "point", "everyone", "how"),
    [
        ("low-rank", 2, 1, "open rank-00001", False, {}),
        ("GaLore", 3, 0, "os.rename .step3.part", True, {"asynchronous": True, "keep": 1}),
        ("Muon", 1, 0, "os.rename .last.part", True, {"tag": "last"}),
        ("SLTrain", 2, 0, "os.rename .latest.part", False, {"asynchronous": True}),
    ],
)
def test_an_engine_killed_in_its_third_save(ranks, tmp_path, method, stage, who, point, everyone, how):
    """What is loaded is in every bit what the run had then, on each process."""
    folder = tmp_path / "a folder"
    with pytest.raises(RankError) as caught:
        run_ranks("tests.deepspeed.surviving:die_saving", 2, method, stage, str(folder), 3, who, point, everyone, **how)
    assert "died with exit code -9" in str(caught.value)
    assert everyone or "may not have been written: processes have lost each other" in str(caught.value)
    # A checkpoint whose manifest has been written only lacks its name.
    written = 2 if point.startswith("open") else 3
    for updates, alike, skipped in ranks(2).run(f"{ENGINES}:survive", method, stage, str(folder)):
        assert (updates, alike, skipped) == (written, True, [])
    assert sorted(path.name for path in folder.iterdir()) == ["latest", f"step{written + 1}"]
    known_state.check_only_text_and_tensors(folder)


SAID = {
    "cut short": "step3/rank-00001.safetensors has {bytes} bytes instead of {bytes}; it holds {names}",
    "a bit of the data": "step3/rank-00001.safetensors has other values of {name} than were written",
    "a bit of the header": "step3/rank-00000.safetensors has another header than the one that was written {names}",
    "a bit of the manifest": "step3/manifest.json is damaged: its checksum does not match",
    "missing": "step3/rank-00000.safetensors is missing; it holds {names}",
    "exchanged": "step3/rank-00000.safetensors has {bytes} bytes instead of {bytes}; it holds {names}",
    "older": "step3/rank-00000.safetensors has other values of {names} than were written",
    "no manifest": "step3/manifest.json is missing: the checkpoint was never finished, or is no megalr checkpoint",
    "empty manifest": "step3/manifest.json is damaged: ",
}


@pytest.mark.parametrize(
    ("method", "stage"), [("low-rank", 2), *(pytest.param("GaLore", s, marks=pytest.mark.slow) for s in (0, 3))]
)
def test_damage_is_named_and_changes_nothing(ranks, tmp_path, method, stage):
    results = ranks(2).run(f"{ENGINES}:damaged", method, stage, str(tmp_path / "a folder"))
    for found in zip(*results, strict=True):
        for name, message, unchanged, folder, skipped in found:
            said = re.escape(SAID[name]).replace(r"\{bytes\}", r"[\d,]+").replace(r"\{names\}", ".+")
            said = said.replace(r"\{name\}", r"\S+")
            assert re.search(said, message), (name, message)
            assert message.endswith('the newest that is whole is "step2"')
            assert unchanged, name
            assert folder == "step2"
            assert [bool(re.search(said, line)) for line in skipped] == [True], (name, skipped)
    assert [name for name, *_ in results[0]] == list(SAID)
