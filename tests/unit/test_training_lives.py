"""The lives of a run in run.json, as the run writes them and whatever else may be there."""

import json

import pytest

from megalr.train.lives import FINISHED, KILLED, end_life, lives_before, lives_of, new_life

FIRST = {"started": "a day", "processes": 2, "from_update": 0, "to_update": 7, "ended": "SIGTERM"}
LAST = new_life("another", 1, 7)


@pytest.mark.parametrize(
    ("settings", "lives"),
    [
        ({"lives": [FIRST, LAST]}, [FIRST, LAST]),
        ({"started": "a day", "processes": 2}, [{**FIRST, "to_update": None, "ended": None}]),  # of an older version
        ({}, []),
        ({"lives": 3, "started": 4, "processes": 2}, []),
        ({"lives": [None, {}, [], {**FIRST, "processes": True}, {**FIRST, "to_update": -1}, FIRST]}, [FIRST]),
        ({"lives": [{**FIRST, "from_update": 1 << 63}, {**FIRST, "ended": 1.5}]}, []),
        ({"lives": [{**FIRST, "more": 1}]}, [FIRST]),
    ],
)
def test_lives_are_read_from_files_of_any_version(settings, lives):
    assert lives_of(settings) == lives


def test_a_life_that_was_killed_has_come_as_far_as_its_rows(tmp_path):
    path = tmp_path / "run.json"
    assert lives_before(path, 3) == []
    path.write_text(json.dumps({"lives": [FIRST, LAST]}))
    assert lives_before(path, 9) == [FIRST, {**LAST, "to_update": 9, "ended": KILLED}]
    path.write_text(json.dumps({"lives": [FIRST]}))
    assert lives_before(path, 9) == [FIRST]
    path.write_text("half")
    assert lives_before(path, 9) == []


def test_the_end_of_a_life_is_written_beside_what_is_there(tmp_path, caplog):
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"command": "x", "lives": [FIRST, LAST]}))
    end_life(path, 9, FINISHED)
    written = json.loads(path.read_text())
    assert written == {"command": "x", "lives": [FIRST, {**LAST, "to_update": 9, "ended": "finished"}]}
    end_life(path, 9, f"a guard\n{'more ' * 99}")
    assert json.loads(path.read_text())["lives"][-1]["ended"] == "a guard"
    assert not caplog.records


@pytest.mark.parametrize("text", [None, "half", "[]", '{"lives": []}', '{"lives": 3}'])
def test_a_file_that_was_damaged_keeps_nobody_from_ending(tmp_path, caplog, text):
    path = tmp_path / "run.json"
    if text is not None:
        path.write_text(text)
    end_life(path, 9, FINISHED)
    assert "cannot be told how the run has ended" in caplog.text
    assert path.exists() == (text is not None) and (text is None or path.read_text() == text)
