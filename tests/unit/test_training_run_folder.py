"""Which folder a run gets, and what may be deleted there."""

import contextlib
import errno
import json
import os
from pathlib import Path

import pytest

from megalr.errors import UserError
from megalr.locks import FolderLock
from megalr.train import run_folder
from megalr.train.run_folder import RunFolder, take_run_folder, write_json
from megalr.train.run_settings import is_a_runs, read_settings
from tests.unprivileged import unprivileged

SETTINGS = '{"command": "pretrain.py", "deepspeed": {}}'


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def make_run(path, *, finished, checkpoint=True, age=0):
    folder = RunFolder(Path(path))
    folder.checkpoints.mkdir(parents=True)
    folder.settings.write_text(SETTINGS)
    folder.metrics.write_text("")
    if checkpoint:
        latest = folder.checkpoints / "latest"
        latest.write_text("step5")
        os.utime(latest, (1_000_000 - age, 1_000_000 - age))
    if finished:
        folder.summary.write_text("{}")
    return folder


def choose(output=None, *, resume=False, overwrite=False):
    with FolderLock() as lock:
        return take_run_folder("zero2", output, resume=resume, overwrite=overwrite, lock=lock).path


def test_the_default_folder_is_named_after_the_configuration():
    assert choose() == Path("runs/zero2")


def test_the_next_number_where_the_default_is_taken():
    make_run("runs/zero2", finished=True)
    assert choose() == Path("runs/zero2-2")
    make_run("runs/zero2-2", finished=False)
    assert choose() == Path("runs/zero2-3")


def test_overwrite_without_a_folder_means_the_default_one():
    make_run("runs/zero2", finished=True)
    assert choose(overwrite=True) == Path("runs/zero2")


def test_resume_without_a_folder_means_the_latest_checkpoint():
    make_run("runs/zero2", finished=False, age=10)
    make_run("runs/zero2-2", finished=False, age=5)
    make_run("runs/zero2-3", finished=False, checkpoint=False)
    assert choose(resume=True) == Path("runs/zero2-2")


def test_resume_without_any_checkpoint_is_refused():
    make_run("runs/zero2", finished=False, checkpoint=False)
    with pytest.raises(UserError, match="no checkpoint under runs/zero2"):
        choose(resume=True)


@pytest.mark.parametrize(("finished", "words"), [(True, "a finished run"), (False, "an unfinished run")])
def test_a_taken_folder_is_refused_unless_the_user_says_what_to_do(finished, words):
    make_run("mine", finished=finished)
    with pytest.raises(UserError, match=f"mine holds {words}.*--resume.*--overwrite"):
        choose("mine")
    assert choose("mine", resume=True) == choose("mine", overwrite=True) == Path("mine")


def test_a_folder_with_other_files_is_free():
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("mine")
    assert choose("mine") == Path("mine")


def test_two_runs_that_start_together_get_a_folder_each():
    with FolderLock() as first, FolderLock() as second:
        held = [take_run_folder("zero2", None, resume=False, overwrite=False, lock=lock) for lock in (first, second)]
    assert [folder.path for folder in held] == [Path("runs/zero2"), Path("runs/zero2-2")]


@pytest.mark.parametrize("first", [{}, {"overwrite": True}, {"resume": True}])
@pytest.mark.parametrize("second", [{}, {"overwrite": True}, {"resume": True}])
def test_a_second_run_in_the_folder_is_refused(first, second):
    if first:
        make_run("mine", finished=False)
    how = [{"resume": False, "overwrite": False, **given} for given in (first, second)]
    with FolderLock() as lock, FolderLock() as other:
        folder = take_run_folder("zero2", "mine", **how[0], lock=lock)
        if not folder.is_taken:
            make_run("mine", finished=False)
        with pytest.raises(UserError, match=f"process {os.getpid()} on .* started .* writes into mine"):
            take_run_folder("zero2", "mine", **how[1], lock=other)


@pytest.mark.parametrize("name", ["loss.png", "routing.txt", "tensorboard", "csv_monitor", "profile"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_no_run_has_written_is_not_deleted(name, overwrite):
    Path("mine").mkdir()
    (Path("mine") / name).mkdir() if "." not in name else (Path("mine") / name).touch()
    with pytest.raises(UserError, match=f"mine holds {name}, which a run would write over"):
        choose("mine", overwrite=overwrite)
    assert (Path("mine") / name).exists()


def test_a_file_is_no_folder():
    Path("mine").write_text("")
    with pytest.raises(UserError, match="is a file"):
        choose("mine")


@pytest.mark.parametrize("name", ["loss.png", "routing.txt", "tensorboard", "csv_monitor", "profile"])
def test_the_default_folder_leaves_what_no_run_has_written_alone(name):
    kept = Path("runs/zero2") / name
    kept.mkdir(parents=True)
    assert choose() == Path("runs/zero2-2")
    assert kept.exists()


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: path.symlink_to(path.name)])
@pytest.mark.parametrize(
    "name", ["run.json", "metrics.jsonl", "summary.json", "loss.png", "routing.txt", "checkpoints/latest"]
)
def test_a_run_goes_on_only_where_its_files_are_files(name, make):
    folder = make_run("runs/zero2", finished=True)
    (folder.checkpoints / "step5").mkdir()
    (folder.checkpoints / "step5" / "manifest.json").write_text("{}")
    (folder.path / name).unlink(missing_ok=True)
    make(folder.path / name)
    words = f"runs/zero2/{name} is (no file|a symbolic link to .*), (which|and) a run writes there: "
    for output in (None, "runs/zero2"):
        with pytest.raises(UserError, match=words):
            choose(output, resume=True)


@pytest.mark.parametrize("name", ["tensorboard", "csv_monitor"])
def test_a_run_goes_on_only_where_its_folders_are_folders(name):
    folder = make_run("mine", finished=True)
    (folder.path / name).write_text("mine")
    with pytest.raises(UserError, match=f"mine/{name} is no folder"):
        choose("mine", resume=True)


@pytest.mark.parametrize(
    "make", [os.mkfifo, lambda path: path.symlink_to("/dev/null"), lambda path: path.symlink_to(".")]
)
@pytest.mark.parametrize(
    "name",
    ["profile/.trace.json.gz.part", "csv_monitor/Train_loss.csv", "tensorboard/deeper/events", "csv_monitor/job"],
)
def test_a_run_goes_on_only_where_its_monitors_write_no_links_and_pipes(name, make):
    folder = make_run("runs/zero2", finished=True)
    (folder.path / name).parent.mkdir(parents=True)
    (folder.path / name).with_name("file").touch()
    assert choose(resume=True) == choose("runs/zero2", resume=True) == folder.path
    make(folder.path / name)
    for output in (None, "runs/zero2"):
        with pytest.raises(UserError, match=f"runs/zero2/{name} is (no file|a symbolic link to .*), (which|and) a run"):
            choose(output, resume=True)
    assert choose(overwrite=True) == folder.path  # where all that is deleted


def test_the_look_at_what_monitors_wrote_is_bounded(monkeypatch):
    folder = make_run("mine", finished=True)
    folder.profile.mkdir()
    for number in range(3):
        (folder.profile / str(number)).touch()
    assert choose("mine", resume=True) == folder.path
    monkeypatch.setattr(run_folder, "MOST_WRITTEN", 2)
    with pytest.raises(UserError, match="hold more than 2 files: move them"):
        choose("mine", resume=True)


def test_resume_from_nothing_is_refused():
    with pytest.raises(UserError, match="no checkpoint in nothing/checkpoints"):
        choose("nothing", resume=True)


def test_clearing_deletes_what_a_run_writes_and_nothing_else():
    folder = make_run("mine", finished=True)
    (folder.path / "tensorboard").mkdir()
    folder.plot.write_text("")
    (folder.path / "notes.txt").write_text("mine")

    folder.clear()

    assert [file.name for file in folder.path.iterdir()] == ["notes.txt"]
    assert not folder.is_taken


def test_a_run_that_is_to_be_replaced_comes_back_unless_something_has_come_of_the_new_one():
    folder = make_run("mine", finished=True)
    before = sorted(path.relative_to("mine") for path in Path("mine").rglob("*"))
    folder.set_aside()
    assert not folder.is_taken
    make_run("mine", finished=False, checkpoint=False)
    folder.put_back()
    assert sorted(path.relative_to("mine") for path in Path("mine").rglob("*")) == before
    folder.set_aside()
    folder.settings.write_text("new")
    folder.drop_old_run()
    folder.put_back()
    assert [path.name for path in Path("mine").iterdir()] == ["run.json"]


@pytest.mark.parametrize("how", [{}, {"overwrite": True}, {"resume": True}])
@pytest.mark.parametrize("begun", [False, True])
def test_a_run_comes_back_whose_replacement_was_killed_before_it_had_made_an_update(how, begun):
    folder = make_run("mine", finished=True)
    folder.set_aside()
    if begun:
        folder.settings.write_text("new")
    with contextlib.suppress(UserError):
        choose("mine", **how)
    assert folder.summary.exists() and folder.settings.read_text() == SETTINGS


WRITTEN = ["checkpoints", "metrics.jsonl", "run.json", "summary.json"]


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("after", range(len(WRITTEN)))
def test_nothing_is_lost_where_a_move_is_killed(monkeypatch, after, back):
    """On the way there, as where a folder is a file system of its own and cannot be moved, or on the way back."""
    folder = make_run("mine", finished=True)
    if back:
        folder.set_aside()
    rename, moved = Path.rename, []

    def killed(path, target):
        if path.name in WRITTEN:
            if len(moved) == after:
                raise OSError(errno.EBUSY, "in use", str(path))
            moved.append(path)
        return rename(path, target)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="in use"):
        patch.setattr(Path, "rename", killed)
        (folder.put_back if back else folder.set_aside)()
    assert len(moved) == after
    folder.put_back()
    assert sorted(path.name for path in Path("mine").iterdir()) == WRITTEN
    assert (folder.checkpoints / "latest").read_text() == "step5"


def test_what_a_killed_deletion_has_left_goes_with_the_next():
    folder = make_run("mine", finished=True)
    (folder.path / ".deleted-1").mkdir()
    folder.set_aside()
    folder.drop_old_run()
    assert list(folder.path.iterdir()) == []


@pytest.mark.parametrize("content", [None, "", "{}", '{"name": "an app"}', SETTINGS[:-3], "[]"])
@pytest.mark.parametrize("how", ["overwrite", "resume"])
def test_what_is_no_runs_is_not_deleted(content, how):
    """Many a program writes "checkpoints"."""
    folder = make_run("mine", finished=False, checkpoint=how == "overwrite")
    folder.settings.unlink()
    words = "no run.json, which a run writes first"
    if content is not None:
        folder.settings.write_text(content)
        words = "none of a run"
    if content is None and how == "resume":
        words = "nothing to resume"
    with pytest.raises(UserError, match=words):
        choose("mine", **{how: True})
    assert folder.checkpoints.exists() and folder.metrics.exists()


@pytest.mark.parametrize("name", ["notes.txt", "mine/notes.txt", "step7/notes.txt", ".hidden/notes.txt"])
@pytest.mark.parametrize("how", ["overwrite", "resume"])
def test_what_others_have_put_among_the_checkpoints_is_not_deleted(name, how):
    folder = make_run("mine", finished=False, checkpoint=how == "overwrite")
    for own in ("step5/manifest.json", "step5/rank-00000.safetensors", ".step6.part/rank-00000.safetensors"):
        if how == "overwrite" or "part" in own:
            (folder.checkpoints / own).parent.mkdir(exist_ok=True)
            (folder.checkpoints / own).touch()
    assert choose("mine", **{how: True}) == Path("mine")
    (folder.checkpoints / name).parent.mkdir(exist_ok=True)
    (folder.checkpoints / name).touch()
    with pytest.raises(UserError, match=f"checkpoints holds {name.partition('/')[0]}, which no run has written"):
        choose("mine", **{how: True})


@pytest.mark.parametrize("how", [{}, {"overwrite": True}, {"resume": True}])
def test_checkpoints_that_cannot_be_read_are_not_taken_for_none(how):
    """As where a network is away: the run would begin anew, and delete them."""
    folder = make_run("mine", finished=False)
    folder.checkpoints.chmod(0)
    with unprivileged(), pytest.raises(UserError, match="checkpoints cannot be read: Permission denied"):
        choose("mine", **how)
    folder.checkpoints.chmod(0o700)


def test_what_cannot_be_deleted_is_named(monkeypatch, caplog):
    folder = make_run("mine", finished=True)
    folder.set_aside()
    monkeypatch.setattr("shutil.rmtree", lambda path, **how: None)
    folder.drop_old_run()
    assert "of the run that was replaced, cannot be deleted" in caplog.text


def test_a_run_whose_settings_are_damaged_goes_on():
    folder = make_run("mine", finished=False)
    folder.settings.write_text("")
    assert choose("mine", resume=True) == Path("mine")


def test_a_folder_that_cannot_be_written(monkeypatch):
    def refuse(*args):
        raise PermissionError(errno.EACCES, "Permission denied", "mine/.writer.json")

    monkeypatch.setattr(FolderLock, "take", refuse)
    with pytest.raises(
        UserError, match=r"mine cannot be written: Permission denied \(mine/.writer.json\): name another"
    ):
        choose("mine")


def test_without_a_folder_the_run_comes_back_too():
    folder = make_run("runs/zero2", finished=True)
    folder.set_aside()
    assert choose() == Path("runs/zero2-2")
    assert folder.summary.exists()
    folder.set_aside()
    assert choose(resume=True) == folder.path
    assert folder.summary.exists()


def test_links_are_not_overwritten(tmp_path):
    folder = make_run("mine", finished=True)
    folder.checkpoints.rename("elsewhere")
    folder.checkpoints.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(
        UserError, match="checkpoints is a symbolic link to .*elsewhere, where --overwrite deletes noth"
    ):
        choose("mine", overwrite=True)
    assert choose("mine", resume=True) == Path("mine")


def test_json_is_written_whole():
    write_json(Path("x.json"), {"a": [1, Path("b")]})
    assert json.loads(Path("x.json").read_text()) == {"a": [1, "b"]}
    assert [file.name for file in Path().iterdir()] == ["x.json"]


def test_a_run_that_begins_anew_keeps_its_metrics(tmp_path):
    folder = RunFolder(tmp_path)
    folder.settings.write_text(SETTINGS)
    folder.metrics.write_text("a row\n")
    assert folder.has_only_begun
    assert choose(str(tmp_path), resume=True) == folder.path
    kept = folder.keep_metrics()
    folder.clear()
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(kept.name, "a row\n")]
    assert folder.keep_metrics() is None
    assert not folder.is_taken


PARTS = (".run.json.part", ".metrics.jsonl.part")
FILES = ("metrics.jsonl", "routing.txt", "loss.png", "run.json", ".writer.json", *PARTS)


@pytest.mark.parametrize("flag", ["resume", "overwrite"])
@pytest.mark.parametrize("name", [*FILES, ".moving", ".replaced"])
def test_links_in_a_run_lead_no_writes_out_of_it(tmp_path, name, flag):
    run = make_run(tmp_path / "run", finished=False)
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "work").write_text("of years")
    (run.path / name).unlink(missing_ok=True)
    (run.path / name).symlink_to(precious / "work" if name in FILES else precious)
    with pytest.raises(UserError, match=f"{name} is a symbolic link to .*precious"):
        choose(str(run.path), **{flag: True})
    assert (precious / "work").read_text() == "of years"


@pytest.mark.parametrize("name", ["metrics.jsonl", "run.json"])
def test_pipes_in_a_run_are_not_waited_for(tmp_path, name):
    run = make_run(tmp_path / "run", finished=False)
    (run.path / name).unlink(missing_ok=True)
    os.mkfifo(run.path / name)
    with pytest.raises(UserError, match=f"{name} is no file"):
        choose(str(run.path), resume=True)
    assert not is_a_runs(run.settings) or name != "run.json"
    if name == "run.json":
        with pytest.raises(UserError, match=r"run.json is not a file"):
            read_settings(run.path)
