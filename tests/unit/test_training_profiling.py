"""A trace of some updates, as Perfetto reads it."""

import gzip
import json
import os

import pytest
import torch

from megalr.timing import Stopwatch, span
from megalr.train.profiling import WARM_UP, Profile


def train(profile, updates):
    stopwatch = Stopwatch(torch.device("cpu"))
    with profile:
        for number in range(updates):
            for name in ("forward", "backward", "optimizer"):
                with stopwatch.measure(name):
                    torch.ones(8, 8) @ torch.ones(8, 8)
            with span("refactorization"), span("hidden", shown=False), span(f"update {number}"):
                pass
            profile.update_is_made()


def names(folder):
    content = json.loads(gzip.decompress((folder / "trace.json.gz").read_bytes()))
    return [event["name"] for event in content["traceEvents"] if event.get("ph") == "X"]


def test_a_trace_has_the_updates_after_the_warm_up(tmp_path):
    folder = tmp_path / "profile"
    train(Profile(folder, 2), WARM_UP + 5)
    found = names(folder)
    for name in ("forward", "backward", "optimizer", "refactorization"):
        assert found.count(name) == 2, name
    assert [name for name in found if name.startswith("update ")] == [f"update {WARM_UP + k}" for k in range(2)]
    assert "aten::mm" in found and "hidden" not in found
    assert [path.name for path in folder.iterdir()] == ["trace.json.gz"]


def test_a_run_that_ends_early_has_what_was_recorded(tmp_path):
    train(Profile(tmp_path / "profile", 50), WARM_UP + 3)
    assert names(tmp_path / "profile").count("forward") == 3


def test_without_updates_to_profile_nothing_is_written(tmp_path):
    train(Profile(tmp_path / "profile", 0), 3)
    assert list(tmp_path.iterdir()) == []


def test_a_trace_that_cannot_be_written_ends_nothing(tmp_path, caplog):
    (tmp_path / "profile").write_text("a file")
    train(Profile(tmp_path / "profile", 1), WARM_UP + 2)
    assert "trace.json.gz cannot be written" in caplog.text


@pytest.mark.parametrize("name", [".trace.json.gz.part", ".trace.json", "trace.json.gz"])
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_nothing_is_written_through_what_lies_in_the_folder(tmp_path, name, kind):
    folder, victim = tmp_path / "profile", tmp_path / "victim"
    folder.mkdir()
    victim.write_text("precious")
    if kind == "link":
        (folder / name).symlink_to(victim)
    else:
        os.mkfifo(folder / name)
    train(Profile(folder, 1), WARM_UP + 2)
    assert victim.read_text() == "precious" and names(folder).count("forward") == 1
    assert [path.name for path in folder.iterdir()] == ["trace.json.gz"]


def test_an_error_in_a_profiled_update_is_the_users_own(tmp_path):
    with pytest.raises(ValueError, match="mine"), Profile(tmp_path / "profile", 1) as profile:
        profile.update_is_made()
        raise ValueError("mine")
