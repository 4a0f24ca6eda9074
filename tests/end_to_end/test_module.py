"""Launchers start ``megalr.pretrain`` by its name, with a configuration that comes with the package."""

import json

import pytest

from tests.end_to_end.commands import CONFIGS, deepspeed, metrics, run, small_run, torchrun


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_a_module_and_a_shipped_configuration_are_enough(tmp_path, launcher):
    folder = tmp_path / "a folder"
    folder.mkdir()
    start = [*deepspeed(2), "--module"] if launcher == "deepspeed" else [*torchrun(1), "-m"]
    flags = ["--deepspeed", "zero2_lowrank.json", *small_run(folder), "--steps", "2", "--batch-size", "4"]
    result = run([*start, "megalr.pretrain", *flags], folder)
    assert result.code == 0, result.output
    made = folder / "runs/zero2_lowrank"
    assert [row["step"] for row in metrics(made) if "loss" in row] == [1, 2]
    settings = json.loads((made / "run.json").read_text())
    assert (
        settings["command"].startswith("megalr pretrain --") and "--deepspeed zero2_lowrank.json" in settings["command"]
    )
    assert settings["arguments"]["deepspeed"] == str(CONFIGS / "zero2_lowrank.json")
    again = run([*start, "megalr.pretrain", *flags, "--output", made], folder)
    assert again.code == (2 if launcher == "deepspeed" else 1), (
        again.output
    )  # torchrun ends with 1 whatever its ranks end with
    assert again.output.count(f"{made} holds a finished run") == 1
