"""The benchmark of tensor parallelism, on a tiny shape."""

import argparse
import json

import pytest

from benchmarks import tensor_parallel
from benchmarks.tensor_parallel import FULL, LOW_RANK, MEGATRON, NAIVE
from megalr.errors import UserError

HIDDEN = 32
SHAPE = {
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 1000,
}


def arguments(*flags):
    parser = argparse.ArgumentParser()
    tensor_parallel.add_arguments(parser)
    return parser.parse_args(list(flags))


def test_counts_and_times_of_two_processes(forked_programs, tmp_path, capsys):
    shape, output = tmp_path / "a shape.json", tmp_path / "raw.json"
    shape.write_text(json.dumps(SHAPE))
    flags = ["--models", str(shape), "--model", str(shape), "--steps", "3", "--tokens", "8", "--output", str(output)]
    tensor_parallel.run(arguments(*flags), tmp_path)
    raw, printed = json.loads(output.read_text()), capsys.readouterr().out
    sent = raw["bytes"][str(shape)]
    # Both of two ranks send each number of an all-reduce once.
    assert sent[FULL] == 4 * 7 * HIDDEN
    assert sent[MEGATRON] == 4 * 4 * HIDDEN
    assert sent[LOW_RANK] == 4 * 7 * HIDDEN / 4
    assert sent[NAIVE] > 4 * sent[LOW_RANK]
    assert "0.44 (aim 0.5)" in printed
    for times in (raw["seconds"], raw["seconds_of_one"]):
        assert {name: len(each) for name, each in times.items()} == {FULL: 3, LOW_RANK: 3}
    assert "1 CPU process of one thread" in printed
    assert all(second > 0 for each in raw["seconds"].values() for second in each)
    assert "| full rank, AutoTP |" in printed and "| 1.00 |" in printed


def test_one_process_is_refused(tmp_path):
    with pytest.raises(UserError, match="at least 2"):
        tensor_parallel.run(arguments("--processes", "1"), tmp_path)
