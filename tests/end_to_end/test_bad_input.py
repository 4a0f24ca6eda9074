"""Mistakes under a launcher: one message, exit code 2, nothing written, nobody waits."""

import json

import pytest

from tests.end_to_end.commands import (
    CONFIGS,
    EVALUATE,
    PRETRAIN,
    deepspeed,
    plain,
    run,
    small_run,
    torchrun,
    write_config,
)


def refused(command, folder, code=2):
    """The message of a command that has to fail, printed by rank 0 alone."""
    before = sorted(folder.rglob("*"))
    result = run(command, folder)
    assert result.code == code, result.output
    assert sorted(folder.rglob("*")) == before
    messages = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert len(messages) == 1, result.output
    assert "megalr/train" not in result.output  # no traceback of ours
    return messages[0]


def test_a_mistake_that_one_rank_finds_ends_all(tmp_path):
    """Rank 0 reads the text while the others wait for it."""
    (tmp_path / "empty.txt").write_text("")
    flags = ["--deepspeed", CONFIGS / "zero2_lowrank.json", *small_run(tmp_path), "--dataset", "empty.txt"]

    assert "empty.txt holds no text" in refused([*deepspeed(2), PRETRAIN, *flags], tmp_path)


def test_a_mistake_in_the_flags_ends_all(tmp_path):
    flags = ["--deepspeed", CONFIGS / "zero2_lowrank.json", "--stepz", "3"]

    assert "unrecognized arguments: --stepz 3" in refused([*torchrun(2), PRETRAIN, *flags], tmp_path, code=1)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"megalr": {"parametrization": {"type": "low_rank", "rank": 33}}}, "rank is 33"),
        ({"train_batch_size": 7, "train_micro_batch_size_per_gpu": 2}, "write 6 or 8"),
    ],
)
def test_a_mistake_in_the_json(tmp_path, sections, words):
    config = write_config(tmp_path / "mine.json", **sections)

    assert words in refused([*plain(), PRETRAIN, "--deepspeed", config, *small_run(tmp_path)], tmp_path)


def test_an_export_of_what_has_no_dense_weights(tmp_path):
    section = {"parametrization": {"type": "cola", "rank": 8}, "refactorization": None, "momentum_reset": None}
    config = write_config(tmp_path / "mine.json", megalr=section)
    flags = ["--deepspeed", config, *small_run(tmp_path), "--export", "dense"]

    assert "--export writes dense weights" in refused([*plain(), PRETRAIN, *flags], tmp_path)


def test_a_finished_run_is_not_written_over(tmp_path):
    done = tmp_path / "done"
    done.mkdir()
    for name in ("run.json", "summary.json"):
        (done / name).write_text("{}")
    flags = ["--deepspeed", CONFIGS / "zero2_lowrank.json", *small_run(tmp_path), "--output", "done"]

    assert "holds a finished run" in refused([*plain(), PRETRAIN, *flags], tmp_path)
    assert json.loads((done / "summary.json").read_text()) == {}


def test_nothing_to_evaluate(tmp_path):
    assert "is no run" in refused([*plain(), EVALUATE, "."], tmp_path)


def test_a_refused_resume_leaves_the_finished_run_as_it_is(tmp_path):
    flags = ["--deepspeed", CONFIGS / "zero1_lowrank.json", *small_run(tmp_path), "--output", "done"]
    assert run([*plain(), PRETRAIN, *flags, "--steps", "2"], tmp_path).code == 0
    files = [tmp_path / "done" / name for name in ("run.json", "summary.json", "metrics.jsonl")]
    before = [file.read_bytes() for file in files]

    result = run([*plain(), PRETRAIN, *flags, "--steps", "4", "--resume", "--seed", "5"], tmp_path)

    assert result.code == 2 and "trained with another seed of the order" in result.output
    assert [file.read_bytes() for file in files] == before
