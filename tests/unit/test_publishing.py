"""Which checkpoints stay, what interrupted saves leave, and what is written when; each process is alone."""

from __future__ import annotations

import os
import pickle
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch

from megalr.checkpoint.arguments import check_client_state, check_keep, check_saved_tag, check_tag, folder_of
from megalr.checkpoint.folders import newest_valid
from megalr.checkpoint.loading import _find, read_entries
from megalr.checkpoint.manifest import (
    MANIFEST,
    Manifest,
    read_manifest,
    read_whole,
    write_manifest,
)
from megalr.checkpoint.publishing import prune, tidy
from megalr.checkpoint.saving import wait_for_checkpoint, write_entries
from megalr.checkpoint.storage import FolderWriter
from megalr.errors import UserError
from tests import known_state
from tests.known_state import FILE, flip, write

# There is no group: a process is alone, as torch says each time.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def test_the_newest_stay(folder):
    write(folder, 4, keep=2)
    assert known_state.names(folder) == ["latest", "step3", "step4"]
    write(folder, 5)
    assert known_state.names(folder) == ["latest", "step3", "step4", "step5"]
    write(folder, 6, keep=1)
    assert known_state.names(folder) == ["latest", "step6"]


@pytest.mark.parametrize("damage", ["missing", "short", "manifest"])
def test_a_damaged_one_displaces_none_that_is_whole(folder, damage):
    path = folder / "step3" / FILE
    if damage == "missing":
        path.unlink()
    elif damage == "short":
        os.truncate(path, 10)
    else:
        os.truncate(folder / "step3" / MANIFEST, 10)
    write(folder, 4, keep=2)
    assert known_state.names(folder) == ["latest", "step2", "step3", "step4"]
    write(folder, 5, keep=2)
    left = ["step3"] if damage == "manifest" else []  # which nobody knows the age of
    assert known_state.names(folder) == ["latest", *left, "step4", "step5"]
    assert newest_valid(folder)[0].updates == 5


def test_after_going_back_the_new_one_stays(folder):
    """The newest is damaged, or was not wanted: the run goes on from an older one, and fewer updates are newer."""
    flip(folder / "step3" / FILE, (folder / "step3" / FILE).stat().st_size - 1)
    write(folder, 2, "again", keep=1)
    assert known_state.names(folder) == ["again", "latest"]


def test_newest_is_what_was_written_last(folder):
    write(folder, 2, "again")
    assert newest_valid(folder)[0].folder == folder / "again"


def test_a_clock_that_was_put_back(folder, monkeypatch):
    monkeypatch.setattr(time, "time_ns", lambda: 5)
    write(folder, 4, keep=2)
    write(folder, 5, keep=2)
    assert known_state.names(folder) == ["latest", "step4", "step5"]
    assert newest_valid(folder)[0].updates == 5


def test_the_same_tag_again(folder):
    for updates in (4, 5):
        write(folder, updates, "step2")
        manifest = read_manifest(folder / "step2")
        assert known_state.wrong(manifest) == []
        assert manifest.updates == updates
        assert known_state.names(folder) == ["latest", "step1", "step2", "step3"]
        assert (folder / "latest").read_text() == "step2"


def test_what_cannot_be_removed_does_not_make_a_failure_of_a_save(folder, monkeypatch, caplog):
    def refuse(*args):
        raise PermissionError("not yours")

    monkeypatch.setattr("megalr.checkpoint.storage.prune", refuse)
    write(folder, 4, keep=1)
    assert "older checkpoints could not be removed: not yours" in caplog.text
    assert newest_valid(folder)[0].updates == 4


@pytest.mark.parametrize("tag", ["step5", "last", "5", "a.b-c_d+e=f", "_", "x" * 200])
def test_tags(tag):
    check_tag(tag)


@pytest.mark.parametrize(
    "tag", ["", ".", "..", ".hidden", "a/b", "/a", "a\\b", "a b", "a\n", "a\0b", "é", "*", "-x", "latest", "x" * 201]
)
def test_odd_tags_are_refused(tag):
    with pytest.raises(UserError, match="write a plain folder name"):
        check_tag(tag)


@pytest.mark.parametrize("tag", [1, [], b"x"])
def test_a_tag_is_a_string(tag):
    for check in (check_tag, check_saved_tag):
        with pytest.raises(UserError, match=r"tag is .*: write "):
            check(tag)


@pytest.mark.parametrize("tag", ["", "x" * 300, "a\0b"])
def test_a_tag_that_no_folder_has(tag):
    with pytest.raises(UserError, match=r"tag is .*: write the name of a checkpoint's folder"):
        check_saved_tag(tag)
    check_saved_tag("best (1)")  # renamed by somebody
    check_saved_tag(None)


@pytest.mark.parametrize("directory", [None, 1, [], b"x", ""])
def test_a_directory_is_a_path(directory):
    with pytest.raises(UserError, match=r"directory is .*: write the folder of all checkpoints"):
        folder_of(directory)


@pytest.mark.parametrize("keep", [0, -1, "1", 1.5, True])
def test_at_least_one_checkpoint_is_kept(keep):
    with pytest.raises(UserError, match=r"keep is .*: write how many checkpoints to leave, at least 1"):
        check_keep(keep)


@pytest.mark.parametrize("state", [1, [], [("a", 1)], None, {"a": {1, 2}}, {"a": float("nan")}, {(1,): 2}])
def test_a_client_state_is_json(state):
    with pytest.raises(UserError, match="client_state (is .*: write a dictionary|cannot be written as JSON)"):
        check_client_state(state)


# --- what interrupted saves leave


def hide(folder, tag, suffix):
    hidden = folder / f".{tag}.{suffix}"
    (folder / tag).rename(hidden)
    return hidden


@pytest.mark.parametrize("suffix", ["part", "old"])
def test_a_checkpoint_without_its_name_is_loaded_and_named(folder, suffix):
    """Of a tag that was being replaced, when it was the only one."""
    for other in ("step1", "step2"):
        shutil.rmtree(folder / other)
    hidden = hide(folder, "step3", suffix)
    assert _find(folder, None)[0].folder == hidden
    assert _find(folder, "step3")[0].folder == hidden
    tidy(folder)
    assert known_state.names(folder) == ["latest", "step3"]
    tidy(folder)
    assert known_state.wrong(read_manifest(folder / "step3")) == []


def test_of_two_the_written_one_gets_the_name(folder):
    hide(folder, "step2", "old")
    write(folder, 4, "step2")
    hide(folder, "step2", "part")
    shutil.copytree(folder / "step1", folder / ".step2.old")
    tidy(folder)
    assert known_state.names(folder) == ["latest", "step1", "step2", "step3"]
    assert read_manifest(folder / "step2").updates == 4
    assert (folder / "latest").read_text() == "step2"


@pytest.mark.parametrize("suffix", ["part", "old"])
@pytest.mark.parametrize("lacking", [MANIFEST, FILE])
def test_half_a_checkpoint_is_removed(folder, suffix, lacking):
    (hide(folder, "step3", suffix) / lacking).unlink()
    assert _find(folder, None)[0].folder == folder / "step2"
    write(folder, 4)
    assert known_state.names(folder) == ["latest", "step1", "step2", "step4"]


def test_what_is_not_of_a_checkpoint_stays(folder):
    for name in (".venv.old", ".work.part"):
        (folder / name).mkdir()
        (folder / name / "precious").write_text("mine")
    (folder / ".notes.old").write_text("mine")
    write(folder, 4, keep=1)
    assert known_state.names(folder) == [".notes.old", ".venv.old", ".work.part", "latest", "step4"]


def test_a_failed_save_leaves_nothing(folder, monkeypatch):
    def refuse(*args):
        raise OSError(28, "No space left on device")

    for function in ("write_manifest", "publish", "sync", "tidy"):
        with monkeypatch.context() as patch:
            patch.setattr(f"megalr.checkpoint.storage.{function}", refuse)
            with pytest.raises(UserError, match=r"step2 could not be written: process 0: \[Errno 28\] No space left"):
                write(folder, 4, "step2", keep=1)
        assert known_state.names(folder) == ["latest", "step1", "step2", "step3"]
        assert read_manifest(folder / "step2").updates == 2


def test_a_rename_that_fails_gives_the_old_one_its_name_back(folder, monkeypatch):
    rename = os.rename

    def refuse(source, target):
        if str(source).endswith(".part"):
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(UserError, match="Input/output error"):
        write(folder, 4, "step2")
    assert known_state.names(folder) == ["latest", "step1", "step2", "step3"]
    assert read_manifest(folder / "step2").updates == 2


def test_a_file_that_the_first_process_does_not_see(folder, monkeypatch):
    """As when every node writes to a disk of its own."""

    written = FolderWriter._write

    def elsewhere(self, plan, planner):
        results = written(self, plan, planner)
        (self._folder / FILE).unlink()
        return results

    monkeypatch.setattr(FolderWriter, "_write", elsewhere)
    with pytest.raises(UserError, match=f"another process has written {FILE}, which is not there: do all see the same"):
        write(folder, 4, keep=1)
    assert known_state.names(folder) == ["latest", "step1", "step2", "step3"]


# --- what is written


def test_json_that_is_read_is_what_was_summed(tmp_path):
    client = {1: "a", "1": "b", "x": float("nan"), "y": (1, 2), "z": "é\udcff"}
    write_manifest(tmp_path, {**known_state.content(1), "client": client})
    assert read_manifest(tmp_path).content["client"]["1"] == "b"


def test_nothing_has_its_name_before_the_disk_has_it(tmp_path, monkeypatch):
    done = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def record_sync(handle):
        done.append(f"sync {Path(os.readlink(f'/proc/self/fd/{handle}')).relative_to(tmp_path)}")
        fsync(handle)

    def record_rename(source, target):
        done.append(f"rename {source.name} {target.name}")
        rename(source, target)

    def record_replace(source, target):
        done.append(f"replace {source.name} {target.name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(os, "rename", record_rename)
    monkeypatch.setattr(os, "replace", record_replace)
    write(tmp_path / "new" / "folder", 1)
    part = "new/folder/.step1.part"
    assert done == [
        "sync .",
        "sync new",
        f"sync {part}/{FILE}",
        f"sync {part}",
        f"sync {part}/{MANIFEST}.part",
        f"replace {MANIFEST}.part {MANIFEST}",
        f"sync {part}",
        "sync new/folder/.latest.part",
        "rename .step1.part step1",
        "sync new/folder",
        "replace .latest.part latest",
        "sync new/folder",
    ]


def test_what_is_written_beside_is_what_there_was(tmp_path, monkeypatch):
    """At once, and again into the copies that are kept."""
    go_on, write_file = threading.Event(), FolderWriter._write

    def wait_and_write(self, plan, planner):
        assert go_on.wait(60)
        return write_file(self, plan, planner)

    monkeypatch.setattr(FolderWriter, "_write", wait_and_write)
    for updates in (1, 2):
        go_on.clear()
        state = known_state.entries(updates, 0, 1)
        write_entries(
            tmp_path, f"step{updates}", known_state.document(updates), state, {}, keep=None, asynchronous=True
        )
        for entry in state.values():
            entry.pieces[0].data.fill_(-1)
        go_on.set()
        wait_for_checkpoint()
        assert known_state.wrong(read_whole(tmp_path / f"step{updates}"), known_state.LIGHT) == []


@pytest.mark.parametrize("content", ['{"name": "an app"}', "", "\x00"])
@pytest.mark.parametrize("beside", [["index.html"], []])
def test_somebody_elses_folder_is_not_replaced(tmp_path, content, beside):
    other = tmp_path / "step1"
    other.mkdir()
    (other / MANIFEST).write_text(content)
    for name in beside:
        (other / name).write_text("")
    with pytest.raises(
        UserError, match="it is there already and no megalr checkpoint: choose another tag or directory"
    ):
        write(tmp_path, 1)
    assert sorted(path.name for path in other.iterdir()) == [*beside, MANIFEST]


def test_what_json_cannot_hold_is_refused_before_anything_is_written(folder):
    state = known_state.entries(4, 0, 1)
    document = {**known_state.document(4), "client": {"seen": {1, 2}}}
    with pytest.raises(UserError, match="client_state cannot be written as JSON .*set is not JSON serializable"):
        write_entries(folder, "step4", document, state, {}, keep=1, asynchronous=False)
    assert known_state.names(folder) == ["latest", "step1", "step2", "step3"]


def test_no_file_is_a_pickle_and_none_is_unpickled(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("something was pickled")

    for name in ("load", "loads", "dump", "dumps", "Unpickler", "Pickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(torch, "save", refuse)
    write(tmp_path, 1)
    manifest, _ = _find(tmp_path, None)
    wanted = known_state.entries(None, 0, 1)
    read_entries(manifest, wanted, None)
    for key, entry in wanted.items():
        assert torch.equal(entry.pieces[0].data, known_state.value(key, 1))
    known_state.check_only_text_and_tensors(tmp_path)


def test_only_whole_ones_are_counted(folder):
    prune(folder, 0)
    assert known_state.names(folder) == ["latest", "step3"]
    assert isinstance(newest_valid(folder)[0], Manifest)
