"""A checkpoint's folder: damage is found and named, the newest whole one is taken, the oldest are removed."""

from __future__ import annotations

import os
import pickle
import re
import shutil
from pathlib import Path

import pytest

from megalr.checkpoint.folders import listed, newest_valid
from megalr.checkpoint.loading import _find
from megalr.checkpoint.manifest import (
    MANIFEST,
    VERSION,
    OtherVersionError,
    problems,
    read_manifest,
    write_manifest,
)
from megalr.checkpoint.saving import wait_for_checkpoint, write_entries
from megalr.errors import UserError
from tests import known_state
from tests.known_state import FILE, flip, write

# There is no group: a process is alone, as torch says each time.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def piece(folder, key):
    """First byte and number of bytes of a tensor in its file."""
    manifest = read_manifest(folder)
    (found,) = manifest.tensors[key]["pieces"]
    return found[3], known_state.value(key, 0).nbytes


def refusal(folder, tag="step3"):
    with pytest.raises(UserError) as caught:
        _find(folder, tag)
    return str(caught.value)


def test_a_manifest_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    """A process may be killed between any two calls; what looks like a checkpoint is one."""
    write_manifest(tmp_path, known_state.content(1))

    def killed(handle):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    for folder in (tmp_path, tmp_path / "another"):
        folder.mkdir(exist_ok=True)
        with pytest.raises(KeyboardInterrupt):
            write_manifest(folder, known_state.content(2))
    assert read_manifest(tmp_path).content == known_state.content(1)
    assert not (tmp_path / "another" / MANIFEST).exists()


def check_passed_over(folder, reason):
    """An explicit load is refused and offers the one before, and without a tag that one is taken."""
    message = refusal(folder)
    assert reason in message
    assert message.endswith(f'Nothing was loaded; of the checkpoints in {folder} the newest that is whole is "step2"')
    manifest, skipped = _find(folder, None)
    assert manifest.folder == folder / "step2"
    assert known_state.wrong(manifest) == []
    assert len(skipped) == 1
    assert reason in skipped[0]


ALL = "it holds layers.0.weight, bias, embedding.weight and 1 more"


def test_whole_checkpoints_have_no_problems(folder):
    for updates in (1, 2, 3):
        manifest = read_manifest(folder / f"step{updates}")
        assert problems(manifest) == []
        assert known_state.wrong(manifest) == []
        assert manifest.updates == updates
    assert newest_valid(folder)[0].folder == folder / "step3"
    assert known_state.names(folder) == ["latest", "step1", "step2", "step3"]
    assert (folder / "latest").read_text() == "step3"


def test_a_file_that_is_cut_short(folder):
    path = folder / "step3" / FILE
    size = path.stat().st_size
    os.truncate(path, size - 1)
    check_passed_over(folder, f"{path} has {size - 1:,} bytes instead of {size:,}; {ALL}")


def test_a_file_that_is_too_long(folder):
    path = folder / "step3" / FILE
    size = path.stat().st_size
    os.truncate(path, size + 1)
    check_passed_over(folder, f"{path} has {size + 1:,} bytes instead of {size:,}; {ALL}")


def test_a_file_that_is_missing(folder):
    path = folder / "step3" / FILE
    path.unlink()
    check_passed_over(folder, f"{path} is missing; {ALL}")


def test_a_file_that_is_empty(folder):
    path = folder / "step3" / FILE
    os.truncate(path, 0)
    check_passed_over(folder, f"{path} has 0 bytes instead of")


@pytest.mark.parametrize("key", known_state.shapes())
def test_a_bit_of_a_tensor(folder, key):
    """The first, one in the midst, the last."""
    begin, length = piece(folder / "step3", key)
    path = folder / "step3" / FILE
    for position in (begin, begin + length // 2, begin + length - 1):
        flip(path, position)
        check_passed_over(folder, f"{path} has other values of {key.partition('/')[2]} than were written")
        flip(path, position)
    assert _find(folder, "step3")[0].updates == 3


def test_bits_of_the_header(folder):
    path = folder / "step3" / FILE
    manifest = read_manifest(folder / "step3")
    first = min(p[3] for found in manifest.tensors.values() for p in found["pieces"])
    for position in range(0, first, 7):
        flip(path, position)
        assert problems(manifest) == [
            f"{path} has another header than the one that was written (another file's?); {ALL}"
        ]
        flip(path, position)
    flip(path, 0)
    check_passed_over(folder, "another header")


def test_bits_of_the_manifest(folder):
    """A flipped bit is found, or has changed nothing that the manifest says."""
    path = folder / "step3" / MANIFEST
    whole = read_manifest(folder / "step3").content
    found = 0
    for position in range(0, path.stat().st_size, 3):
        flip(path, position)
        try:
            assert read_manifest(folder / "step3").content == whole
        except UserError as error:
            assert str(error).startswith(f"{path} is ")
            found += 1
        flip(path, position)
    assert found > 0.3 * path.stat().st_size
    flip(path, path.stat().st_size // 2)
    check_passed_over(folder, f"{path} is damaged: ")


@pytest.mark.parametrize("text", ["", "{", "null", "[]", "3", "{}", f'{{"version": {VERSION}}}', "\0" * 100, "\udcff"])
def test_a_manifest_that_is_none(folder, text):
    path = folder / "step3" / MANIFEST
    path.write_bytes(text.encode(errors="surrogateescape"))
    check_passed_over(folder, f"{path} is damaged: ")


def test_a_failure_that_nobody_waits_for_is_in_the_log(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    write_entries(tmp_path / "file", "step1", {"numbers": {}}, {}, {}, keep=None, asynchronous=True)
    with pytest.raises(UserError, match="step1 could not be written: process 0: "):
        wait_for_checkpoint()
    (line,) = [record.getMessage() for record in caplog.records if record.name == "megalr.checkpoint.saving"]
    assert line.startswith(f"{tmp_path / 'file' / 'step1'} could not be written: process 0: ")
    wait_for_checkpoint()  # it is said once


@pytest.mark.parametrize(
    ("version", "words"),
    [
        (VERSION + 1, "was written by a newer megalr: it is of version 3, .* Update megalr to load it$"),
        (VERSION - 1, "is of version 1, and this megalr reads version 2: load the .* with the megalr that wrote it$"),
    ],
)
def test_a_manifest_of_another_version(folder, version, words):
    path = folder / "step3" / MANIFEST
    path.write_text(f'{{"version": {version}, "otherwise": []}}')
    with pytest.raises(OtherVersionError, match=f"^{re.escape(str(path))} {words}") as caught:
        read_manifest(path.parent)
    assert "damaged" not in str(caught.value)
    check_passed_over(folder, str(caught.value))


def test_a_folder_without_a_manifest(folder):
    path = folder / "step3" / MANIFEST
    path.unlink()
    check_passed_over(folder, f"{path} is missing: the checkpoint was never finished, or is no megalr checkpoint")


def test_a_file_of_an_older_checkpoint(folder):
    path = folder / "step3" / FILE
    shutil.copy(folder / "step2" / FILE, path)
    check_passed_over(folder, f"{path} has other values of embedding.weight, layers.0.weight, norm.weight")


def test_a_manifest_of_an_older_checkpoint(folder):
    shutil.copy(folder / "step2" / MANIFEST, folder / "step3" / MANIFEST)
    assert "other values of" in refusal(folder)
    assert _find(folder, None)[0].folder == folder / "step2"


def test_a_link_or_folder_in_place_of_a_file(folder):
    path = folder / "step3" / FILE
    path.unlink()
    path.symlink_to(folder / "nowhere")
    check_passed_over(folder, f"{path} is missing")
    path.unlink()
    path.mkdir()
    assert str(path) in refusal(folder)


def test_latest_is_for_people(folder):
    """What it says is not needed, and does not mislead."""
    for text in ("", "nothing\n", "step1\n", "../..\n"):
        (folder / "latest").write_text(text)
        assert _find(folder, None)[0].folder == folder / "step3"
    (folder / "latest").unlink()
    assert _find(folder, None)[0].folder == folder / "step3"


def test_a_checkpoint_of_deepspeed_in_the_same_folder(folder):
    other = folder / "global_step7"
    other.mkdir()
    states = other / "mp_rank_00_model_states.pt"
    states.write_bytes(pickle.dumps("not to be read"))
    manifest, skipped = _find(folder, None)
    assert manifest.folder == folder / "step3"
    assert skipped == []
    with pytest.raises(UserError, match="global_step7 could not be written: process 0: it is there already and no meg"):
        write(folder, 7, "global_step7", keep=1)
    assert states.is_file()
    assert "no megalr checkpoint\nNothing was loaded" in refusal(folder, "global_step7")
    write(folder, 8, keep=1)
    assert known_state.names(folder) == ["global_step7", "latest", "step8"]
    assert states.is_file()


def test_nothing_there(tmp_path):
    for place, message in (
        (tmp_path, f"{tmp_path} holds no checkpoint that megalr.save_checkpoint has written"),
        (tmp_path / "nowhere", f"there is no {tmp_path / 'nowhere'}"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            _find(place, None)
        assert "is missing" in refusal(place)
        assert refusal(place).endswith("no other is whole")
    (tmp_path / "step3").write_text("a file")
    assert "is damaged: [Errno 20] Not a directory" in refusal(tmp_path)


def test_folders_that_another_process_removes_meanwhile(folder, monkeypatch):
    (folder / ".step4.part").mkdir()
    (folder / "step5").mkdir()
    seen, listdir = [], os.listdir

    def remove_first(path):
        seen.append(Path(path).name)
        if Path(path).name == "step5":
            Path(path).rmdir()
        return listdir(path)

    monkeypatch.setattr(os, "listdir", remove_first)
    assert [each.folder.name for each in listed(folder)] == ["step3", "step2", "step1"]
    assert "step5" in seen
    assert ".step4.part" not in seen  # which is what a save that fails removes


def test_a_checkpoints_own_folder_that_lost_its_manifest(folder):
    (folder / "step2" / MANIFEST).unlink()
    with pytest.raises(UserError, match="step2/manifest.json is missing: the checkpoint was never finished"):
        _find(folder / "step2", None)


def test_all_damaged(folder):
    for updates in (1, 2, 3):
        (folder / f"step{updates}" / FILE).unlink()
    with pytest.raises(UserError) as caught:
        _find(folder, None)
    message = str(caught.value)
    assert re.findall(r"/(step\d)/", message) == ["step3", "step2", "step1"]
    assert message.count("is missing; it holds") == 3
    assert refusal(folder).endswith("no other is whole")
