"""The benchmark of checkpoints, on a tiny shape."""

import argparse
import json

import pytest

from benchmarks import checkpoints
from benchmarks.checkpoints import AT_ONCE, BESIDE, DEEPSPEED
from megalr.errors import UserError

SHAPE = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 1000,
}


def arguments(*flags):
    parser = argparse.ArgumentParser()
    checkpoints.add_arguments(parser)
    return parser.parse_args(list(flags))


def test_times_and_sizes_of_two_processes(forked_programs, tmp_path, capsys):
    shape, output = tmp_path / "a shape.json", tmp_path / "raw.json"
    shape.write_text(json.dumps(SHAPE))
    flags = ["--model", str(shape), "--methods", "AdamW", "--saves", "2", "--folder", str(tmp_path)]
    checkpoints.run(arguments(*flags, "--output", str(output)), tmp_path)
    found = json.loads(output.read_text())["AdamW"]
    assert {kind: len(each) for kind, each in found["seconds"].items()} == {DEEPSPEED: 2, AT_ONCE: 2, BESIDE: 2}
    assert all(second > 0 for each in found["seconds"].values() for second in each)
    # Masters and two moments; DeepSpeed has the weights as well.
    elements = 2 * 1000 * 128 + 2 * (4 * 128**2 + 3 * 128 * 256) + 5 * 128
    assert 12 * elements < found["bytes"][AT_ONCE] < 12.5 * elements
    assert found["bytes"][AT_ONCE] < found["bytes"][DEEPSPEED]
    assert "| AdamW | megalr, asynchronous |" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a shape.json", "raw.json"]


def test_nothing_to_save_is_refused(tmp_path):
    with pytest.raises(UserError, match="at least 1"):
        checkpoints.run(arguments("--saves", "0"), tmp_path)
