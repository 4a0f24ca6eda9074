"""What tests share: checkpoints, and the comparison of methods."""

import json
import subprocess
from types import SimpleNamespace

import pytest
import yaml

from tests import known_state, warm
from tests.unit.comparison_recipes import FAKE, SHAPE, content


@pytest.fixture
def forked_programs(monkeypatch):
    """Programs that megalr.processes starts are forked from one that has imported everything."""
    forking = SimpleNamespace(Popen=warm.popen, DEVNULL=subprocess.DEVNULL, STDOUT=subprocess.STDOUT)
    monkeypatch.setattr("megalr.processes.subprocess", forking)


@pytest.fixture
def folder(tmp_path):
    """With three checkpoints."""
    folder = tmp_path / "a folder" / "with spaces"
    for updates in (1, 2, 3):
        known_state.write(folder, updates)
    return folder


@pytest.fixture
def write(tmp_path):
    """Writes a recipe into a folder with a space in its name, beside the model's shape."""
    folder = tmp_path / "a recipe"
    folder.mkdir()
    (folder / "small.json").write_text(json.dumps(SHAPE))

    def _write(raw=None, **changes):
        path = folder / "recipe.yaml"
        path.write_text(raw or yaml.safe_dump(content(**changes), sort_keys=False))
        return path

    return _write


@pytest.fixture
def launchers(tmp_path):
    folder = tmp_path / "launchers"
    (folder / "models").mkdir(parents=True)
    (folder / "pretrain.py").write_text(FAKE)
    return folder
