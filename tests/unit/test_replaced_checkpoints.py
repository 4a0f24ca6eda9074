"""A checkpoint that is replaced under its name while it is read: one save is read, or none, and never parts of both."""

from __future__ import annotations

import itertools
import shutil

import pytest
import torch
from safetensors.torch import load_file

from megalr.checkpoint import folders, inspecting, verifying
from megalr.checkpoint import manifest as manifests
from megalr.checkpoint.__main__ import main
from megalr.checkpoint.export import weights
from megalr.checkpoint.folders import newest_whole, read_or_offer, whole_checkpoint
from megalr.checkpoint.loading import read_entries
from megalr.checkpoint.manifest import ReplacedError, check_same, read_manifest, read_whole
from megalr.checkpoint.storage import FolderReader
from megalr.errors import UserError
from tests import known_state
from tests.known_state import FILE, write

# There is no group: a process is alone, as torch says each time.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
WORDS = "last was replaced by another save while it was read: run again"


@pytest.fixture
def directory(tmp_path):
    write(tmp_path, 1, "last")
    return tmp_path


@pytest.fixture
def replacing(directory, monkeypatch):
    """Has another save take the place of the first before a function of a module is called, so many times."""
    saves = itertools.count(2)

    def before(module, name, times=1):
        original, left = getattr(module, name), iter(range(times))

        def act(*args, **kwargs):
            if next(left, None) is not None:
                write(directory, next(saves), "last")
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, act)

    return before


@pytest.mark.parametrize("tensors", [0, 2])
def test_nothing_is_exported_of_two_saves(directory, monkeypatch, tmp_path, capsys, tensors):
    """After a few tensors, as every tensor's file is opened by its name."""
    read, seen, out = weights.read_tensor, [], tmp_path / "out"

    def read_and_replace(manifest, key):
        if len(seen) == tensors:
            write(directory, 2, "last")
        seen.append(key)
        return read(manifest, key)

    monkeypatch.setattr(weights, "read_tensor", read_and_replace)
    argv = ["export", str(directory / "last"), str(out), "--to", "safetensors"]
    assert main(argv) == 2
    assert WORDS in capsys.readouterr().err
    assert len(seen) > tensors
    assert not out.exists()
    assert main(argv) == 0  # again, as it says
    for name, tensor in load_file(out / "model.safetensors").items():
        key = f"weights/{name}" if f"weights/{name}" in known_state.shapes() else f"frozen/{name}"
        assert torch.equal(tensor, known_state.value(key, 2).float())


def test_nothing_is_loaded_of_two_saves(directory, replacing):
    manifest, _ = newest_whole(directory)
    replacing(FolderReader, "read_data")
    with pytest.raises(UserError, match=f"{WORDS}. A part has been loaded: do not go on"):
        read_entries(manifest, known_state.entries(None, 0, 1), None)
    read_entries(read_manifest(directory / "last"), known_state.entries(None, 0, 1), None)


def test_a_checkpoint_that_is_removed_while_it_is_read_is_said_to_be(directory, monkeypatch):
    manifest, _ = newest_whole(directory)
    shutil.rmtree(directory / "last")
    with pytest.raises(UserError, match="last was replaced or removed while it was read"):
        read_entries(manifest, known_state.entries(None, 0, 1), None)
    with pytest.raises(ReplacedError, match=r"removed while it was read \(No such file"):
        manifests.problems(manifest)


def test_a_save_with_the_same_numbers_is_another_one(directory):
    first = read_manifest(directory / "last")
    check_same(first)
    write(directory, 1, "last")
    with pytest.raises(ReplacedError, match=WORDS):
        check_same(first)


def test_what_is_replaced_while_it_is_checked_is_not_called_damaged(directory, replacing):
    """And is checked again, a few times."""
    replacing(folders, "problems")
    manifest, skipped = newest_whole(directory)
    assert (manifest.updates, skipped) == (2, [])
    replacing(manifests, "problems", times=2)
    assert read_or_offer(directory / "last", directory / "last", "").updates == 4
    for found in (read_whole(directory / "last"), whole_checkpoint(directory / "last")[0]):
        assert known_state.wrong(found) == []


def test_what_is_replaced_again_and_again_is_refused(directory, replacing, capsys):
    for module in (manifests, folders, verifying):
        replacing(module, "problems", times=100)
    for look in (lambda: newest_whole(directory), lambda: whole_checkpoint(directory / "last")):
        with pytest.raises(ReplacedError, match=WORDS):
            look()
    assert main(["verify", str(directory)]) == 2
    assert WORDS in capsys.readouterr().err


def test_inspect_does_not_call_it_damaged(directory, monkeypatch, capsys):
    look, path = inspecting.missing_or_cut, directory / "last" / FILE

    def replace_and_look(manifest):
        write(directory, 2, "last")
        path.write_bytes(path.read_bytes() + b" ")
        return look(manifest)

    monkeypatch.setattr(inspecting, "missing_or_cut", replace_and_look)
    assert main(["inspect", str(directory)]) == 0
    assert WORDS in capsys.readouterr().out
    assert main(["inspect", str(directory / "last")]) == 2
    assert WORDS in capsys.readouterr().err


def test_a_manifest_that_was_made_in_memory_is_not_looked_for(tmp_path):
    check_same(manifests.Manifest(tmp_path, known_state.content(1)))
