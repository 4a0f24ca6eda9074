"""What cannot be read in a directory of checkpoints, or is somebody else's there, is in nobody's way."""

import pytest

from megalr.checkpoint import inspecting
from megalr.checkpoint.__main__ import main
from megalr.checkpoint.folders import latest, listed, newest_valid, newest_whole
from megalr.checkpoint.loading import _find
from megalr.checkpoint.saving import Saver
from megalr.errors import UserError
from megalr.train.run_folder import RunFolder
from tests import known_state
from tests.unprivileged import unprivileged


@pytest.fixture
def closed(folder):
    """Three checkpoints, and what a file system and other people have put beside them."""
    (folder / "notes.txt").write_text("")
    (folder / "logs").mkdir()
    (folder / "loop").symlink_to("loop")
    (folder / "app").mkdir()
    (folder / "app" / "manifest.json").write_text('{"name": "an app"}')
    made = [folder / name for name in ("lost+found", ".hidden", ".step9.part", "mine")]
    for each in made:
        each.mkdir(mode=0)
    yield folder
    for each in made:
        each.chmod(0o700)


def test_whole_checkpoints_beside_it_are_found(closed):
    with unprivileged():
        found, (app, mine) = newest_valid(closed)
        assert found.folder.name == "step3"
        assert mine == f"{closed / 'mine'} cannot be read: Permission denied"
        assert "app/manifest.json" in app
        assert newest_whole(closed)[0].folder.name == "step3"
        assert _find(closed, "step2")[0].folder.name == "step2"
        assert [each.is_open for each in listed(closed)] == [True, True, True, True, False]
        with pytest.raises(UserError, match="mine.*Permission denied"):
            _find(closed, "mine")


def test_saves_go_on_beside_it(closed, monkeypatch):
    monkeypatch.setattr(Saver, "_current", None)  # whose thread has the privileges that there were at its start
    with unprivileged():
        known_state.write(closed, 4, keep=2)
    assert latest(closed) == "step4"
    assert {"step1", "step2"}.isdisjoint(known_state.names(closed))
    assert {"step3", "step4", "lost+found", ".hidden", ".step9.part", "mine", "app"} < set(known_state.names(closed))
    with unprivileged(), pytest.raises(UserError, match="it is there already and no megalr checkpoint"):
        known_state.write(closed, 5, tag="mine")


def test_a_run_goes_on_beside_it(closed):
    run = RunFolder(closed.parent)
    closed.rename(run.checkpoints)
    try:
        (run.checkpoints / "latest").unlink()
        with unprivileged():
            assert run.can_resume
        run.checkpoints.chmod(0)
        with unprivileged():
            assert not run.can_resume
            with pytest.raises(UserError, match="checkpoints cannot be read: Permission denied"):
                newest_whole(run.checkpoints)
    finally:
        run.checkpoints.chmod(0o700)
        run.checkpoints.rename(closed)


def test_the_tool_names_it(closed, capsys):
    with unprivileged():
        assert inspecting._line(listed(closed)[-1]) == f"{closed / 'mine'} cannot be read: Permission denied"
        assert main(["verify", str(closed)]) == 1  # it may be a checkpoint
        printed = capsys.readouterr().out
    assert printed.count("is whole") == 3 and "mine cannot be read" in printed and "lost+found" not in printed
