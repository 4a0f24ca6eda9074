"""A folder has one writer: the second is told who the first is, and a kill leaves nothing behind."""

import errno
import fcntl
import json
import os
import shutil
import signal
import socket

import pytest

from megalr import locks
from megalr.locks import NAME, FolderGoneError, FolderInUseError, FolderLock
from tests.processes import python, run, started

HOLDING = """
import sys, time
from pathlib import Path
from megalr.locks import FolderLock
FolderLock().take(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


def test_a_second_writer_is_told_of_the_first(tmp_path):
    with FolderLock() as first:
        first.take(tmp_path / "run")
        with pytest.raises(FolderInUseError) as caught, FolderLock() as second:
            second.take(tmp_path / "run")
    message = str(caught.value)
    assert f"process {os.getpid()} on {socket.gethostname()}, started 2" in message
    assert f"writes into {tmp_path / 'run'}" in message and "--output" in message


def test_nothing_is_left_of_a_folder_that_was_made_for_it(tmp_path):
    with FolderLock() as lock:
        lock.take(tmp_path / "runs" / "one")
        assert lock.held
    assert list(tmp_path.iterdir()) == []
    with FolderLock() as lock:
        lock.take(tmp_path / "runs" / "one")
        (tmp_path / "runs" / "one" / "a file").touch()
    assert [path.name for path in (tmp_path / "runs" / "one").iterdir()] == ["a file"]


def test_a_killed_holder_holds_nothing(tmp_path):
    with started(python(HOLDING, tmp_path), warm=True) as process:
        process.read_until("held")
        pid = json.loads((tmp_path / NAME).read_text())["pid"]
        with pytest.raises(FolderInUseError, match=f"process {pid} "):
            FolderLock().take(tmp_path)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (tmp_path / NAME).exists()
    with FolderLock() as lock:
        lock.take(tmp_path)


FORKING = """
import multiprocessing, sys, time
from pathlib import Path
from megalr.locks import FolderLock
lock = FolderLock()
lock.take(Path(sys.argv[1]))
child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
child.start()
lock.release()
FolderLock().take(Path(sys.argv[1]))
child.kill()
print("taken again")
"""


def test_a_child_that_lives_on_does_not_hold_it(tmp_path):
    assert run(python(FORKING, tmp_path), warm=True).stdout == "taken again\n"


def test_without_locks_the_process_is_looked_for(tmp_path, monkeypatch, caplog):
    def refuse(*args):
        raise OSError(errno.EOPNOTSUPP, "no locks here")

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    first = FolderLock()
    first.take(tmp_path)
    assert "without locks" in caplog.text
    with pytest.raises(FolderInUseError, match=f"process {os.getpid()} "):
        FolderLock().take(tmp_path)
    (tmp_path / NAME).write_text(json.dumps({"host": "elsewhere", "pid": 1, "started": 0}))
    FolderLock().take(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": 1}', "[" * 4000, "\0"])
def test_whatever_is_in_the_file(tmp_path, content):
    (tmp_path / NAME).write_text(content)
    with (tmp_path / NAME).open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(FolderInUseError, match="another process writes into"):
            FolderLock().take(tmp_path)
    with FolderLock() as lock:
        lock.take(tmp_path)


def test_a_folder_that_is_moved_is_not_held_any_more_and_the_next_one_is_left_alone(tmp_path):
    run, kept = tmp_path / "run", tmp_path / "kept here"
    with FolderLock() as lock:
        lock.check()  # holds nothing yet
        lock.take(run)
        lock.check()
        run.rename(kept)
        next_one = FolderLock()
        for meanwhile in (lambda: None, lambda: next_one.take(run)):
            meanwhile()
            with pytest.raises(FolderGoneError) as caught:
                lock.check()
            assert str(caught.value).startswith(f"{run} was moved to {kept} while this run wrote there")
            assert f"write --output '{kept}', and add --resume" in str(caught.value)
    next_one.check()
    next_one.release()


def test_a_folder_that_is_moved_back_is_held(tmp_path):
    with FolderLock() as lock:
        lock.take(tmp_path / "run")
        (tmp_path / "run").rename(tmp_path / "kept")
        assert not lock.is_in_place
        (tmp_path / "kept").rename(tmp_path / "run")
        lock.check()
        with pytest.raises(FolderInUseError):
            FolderLock().take(tmp_path / "run")


@pytest.mark.parametrize("knows", [True, False])
def test_what_is_said_of_a_folder_or_lock_that_is_deleted(tmp_path, monkeypatch, knows):
    """Also where the system does not say what became of a file."""
    if not knows:
        monkeypatch.setattr(locks.os, "readlink", lambda path: (_ for _ in ()).throw(FileNotFoundError(path)))
    run = tmp_path / "run"
    with FolderLock() as lock:
        lock.take(run)
        (run / NAME).unlink()
        with pytest.raises(FolderGoneError, match=f"{run / NAME}, which keeps other runs out .* --resume"):
            lock.check()
        shutil.rmtree(run)
        with pytest.raises(FolderGoneError, match=f"{run} was moved or deleted while .* start {run} anew"):
            lock.check()
    assert not run.exists()
