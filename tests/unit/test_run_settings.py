"""run.json, whatever is in it: read as it was written, or refused with what to do."""

import json

import pytest

from megalr.data import DataConfig
from megalr.errors import UserError
from megalr.train.run_settings import is_a_runs, read_settings

WHOLE = {
    "command": "pretrain.py",
    "deepspeed": {"train_micro_batch_size_per_gpu": 4, "megalr": {"parametrization": {"type": "full"}}},
    "model": {"hidden_size": 32},
    "data": {
        "dataset": ["a.txt", "b.txt"],
        "eval_dataset": None,
        "eval_fraction": 0.1,
        "tokenizer": None,
        "sequence_length": 32,
        "pack": True,
        "fingerprint": "of the tokens",
    },
}


def changed(section, key, value):
    return {**WHOLE, section: {**WHOLE[section], key: value}}


def without(section, key):
    return {**WHOLE, section: {k: v for k, v in WHOLE[section].items() if k != key}}


def test_what_was_written_is_read(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(WHOLE))
    found = read_settings(tmp_path)
    assert found.text == DataConfig(dataset=["a.txt", "b.txt"], eval_fraction=0.1, sequence_length=32)
    assert found.model == {"hidden_size": 32}
    assert found.micro_batch_size == 4
    assert is_a_runs(tmp_path / "run.json")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is not valid JSON"),
        (json.dumps(WHOLE).encode()[:200], "is not valid JSON"),
        (b"\xff\xfe", "is not UTF-8"),
        (b"[" * 100_000, "too deep"),
        (b"[1]", "must hold a JSON object, not a list"),
        ({}, 'has no object "deepspeed"'),
        ({"name": "somebody else's"}, 'has no object "deepspeed"'),
        ({**WHOLE, "model": []}, 'has no object "model"'),
        ({**WHOLE, "deepspeed": "zero2.json"}, 'has no object "deepspeed"'),
        (without("deepspeed", "train_micro_batch_size_per_gpu"), "is no positive whole number"),
        (changed("deepspeed", "train_micro_batch_size_per_gpu", "4"), "is no positive whole number"),
        (changed("deepspeed", "megalr", []), '"megalr" must be an object'),
        (without("data", "tokenizer"), "has no data.tokenizer: another version"),
        (changed("data", "bos", True), "has data.bos, which this megalr does not know"),
        (changed("data", "sequence_length", "32"), "sequence_length is"),
        (changed("data", "sequence_length", 1), "it needs at least 2 tokens"),
        (changed("data", "pack", "yes"), "data.pack is"),
        (changed("data", "dataset", [1]), "data.dataset is neither a name nor a list of names"),
        (changed("data", "dataset", None), "data.dataset is neither a name nor a list of names"),
    ],
)
def test_whatever_else_is_in_it_is_named_with_what_to_do(tmp_path, content, words):
    path = tmp_path / "run.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(UserError) as error:
        read_settings(tmp_path)
    assert words in str(error.value) and "run.json" in str(error.value)
    assert f"megalr.checkpoint export {tmp_path / 'checkpoints'} OUT" in str(error.value)


def test_none_or_none_that_can_be_read(tmp_path):
    with pytest.raises(UserError, match=r"run\.json cannot be read: No such file"):
        read_settings(tmp_path)
    (tmp_path / "run.json").mkdir()
    with pytest.raises(UserError, match=r"run\.json cannot be read: Is a directory"):
        read_settings(tmp_path)
    assert not is_a_runs(tmp_path / "run.json")
