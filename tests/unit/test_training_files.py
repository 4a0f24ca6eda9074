"""metrics.jsonl, settings kept with checkpoints, and the folder of an export."""

import json

import pytest

from megalr.checkpoint.manifest import write_manifest
from megalr.data.files import local_files
from megalr.errors import UserError
from megalr.train.arguments import PretrainArguments
from megalr.train.checkpoints import Notes, check_notes, differences, find_checkpoint
from megalr.train.export import check_export_folder
from megalr.train.metrics import MetricsLog
from megalr.train.preparation import data_config
from megalr.train.run_folder import RunFolder
from tests import known_state


def test_metrics_are_cut_where_a_resumed_run_goes_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, enabled=True)
    log.append({"step": 0, "eval_perplexity": 4100.0})
    for step in range(1, 6):
        log.append({"step": step, "loss": 8.0 - step})
    with path.open("a") as file:
        file.write('{"step": 6, "lo')  # killed here

    log.cut(3)

    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert log.untrained_perplexity() == 4100.0


def test_a_text_is_noted_by_what_stands_for_it_from_everywhere(tmp_path, monkeypatch):
    here = tmp_path / "a [1] folder"
    (here / "austen").mkdir(parents=True)
    (tmp_path / "own.json").write_text("{}")
    (here / "words.txt").write_text("words")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(here)

    def noted(*texts, tokenizer="t5-base"):
        config = data_config(PretrainArguments(deepspeed="x", dataset=texts, tokenizer=tokenizer), 0)
        return config.dataset, config.tokenizer

    assert noted("words.txt", tokenizer="~/own.json") == (str(here / "words.txt"), str(tmp_path / "own.json"))
    assert noted("austen") == ("austen", "t5-base")
    assert noted("allenai/c4") == ("allenai/c4", "t5-base")
    (pattern, file), _ = noted("*.txt", "words.txt")
    assert file == str(here / "words.txt")
    monkeypatch.chdir("/")
    assert [str(path) for path in local_files([pattern])[0]] == [file]


def test_other_ranks_write_no_metrics(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", enabled=False)
    log.append({"step": 1})
    log.cut(0)
    assert list(tmp_path.iterdir()) == []


def test_differences_name_the_value_that_differs():
    old = {"model": {"hidden_size": 128, "layers": 4}, "betas": (0.9, 0.999), "stage": 2}
    new = {"model": {"hidden_size": 256, "layers": 4}, "betas": [0.9, 0.999], "rank": 8}

    assert differences(old, new) == [
        "model.hidden_size: 128 -> 256",
        "rank: null -> 8",
        "stage: 2 -> null",
    ]
    assert differences(old, json.loads(json.dumps(old))) == []
    assert differences({"labels": {0: "a"}}, {"labels": {"0": "a"}}) == []  # keys are strings once they were saved


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    notes = Notes("step3", 3, 300, {"model": {"hidden_size": 128}, "train_batch_size": 2}, {})
    with pytest.raises(UserError) as error:
        check_notes(notes, {"model": {"hidden_size": 64}, "train_batch_size": 1}, RunFolder(tmp_path))
    assert "model.hidden_size: 128 -> 64" in str(error.value)
    assert "train_batch_size: 2 -> 1" in str(error.value)
    check_notes(notes, notes.required, RunFolder(tmp_path))


def test_notes_of_a_checkpoint_that_no_run_wrote(tmp_path):
    folder = RunFolder(tmp_path)
    (folder.checkpoints / "global_step7").mkdir(parents=True)
    with pytest.raises(UserError, match="checkpoints holds no checkpoint that megalr.save_checkpoint has written"):
        find_checkpoint(folder)
    (folder.checkpoints / "global_step7/mp_rank_00_model_states.pt").write_text("")
    with pytest.raises(UserError, match="checkpoints holds checkpoints of DeepSpeed's own"):
        find_checkpoint(folder)
    write_manifest(folder.checkpoints / "global_step7", known_state.content(7))
    with pytest.raises(UserError, match="global_step7 is no checkpoint of a pretraining run"):
        find_checkpoint(folder)


def test_an_export_replaces_nothing_unasked(tmp_path):
    assert check_export_folder(str(tmp_path / "new"), may_replace=False) == tmp_path / "new"
    assert check_export_folder(str(tmp_path), may_replace=False) == tmp_path
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="is not empty"):
        check_export_folder(str(tmp_path), may_replace=False)
    with pytest.raises(UserError, match="or move the export there away"):
        check_export_folder(str(tmp_path), may_replace=False, resumes=True)
    assert check_export_folder(str(tmp_path), may_replace=True) == tmp_path
    with pytest.raises(UserError, match="is a file"):
        check_export_folder(str(tmp_path / "config.json"), may_replace=True)


def test_an_export_never_replaces_something_else(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="--export .* holds something else than an export"):
        check_export_folder(str(tmp_path), may_replace=True)
