"""The optimizer benchmark: its arithmetic, its tables, its accounting of bytes, and runs of a few steps."""

import argparse
import importlib.util
import json
import sys

import pytest
import torch
import torch.distributed as dist

from benchmarks import optimizer, traffic
from benchmarks.accounting import SentBytes, sent_bytes
from benchmarks.contenders import BLOCKS, CONTENDERS
from benchmarks.timing import Summary, take_turns

SHAPE = {"hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
MATRICES = 4 * 64 * 64 + 3 * 64 * 172  # elements of one layer's, in the model whose bytes are counted


@pytest.fixture
def shape_file(tmp_path):
    path = tmp_path / "shape.json"
    path.write_text(json.dumps({"model_type": "llama", **SHAPE}))
    return path


def arguments(*flags):
    parser = argparse.ArgumentParser()
    optimizer.add_arguments(parser)
    return parser.parse_args(list(flags))


def test_summary_of_two_hundred_steps():
    seconds = [9.0] + [float(k) for k in range(199)]
    summary = Summary.of(seconds)
    assert summary.first == 9.0
    assert summary.max == 198.0
    assert summary.median == pytest.approx((98 + 99) / 2, abs=1)
    assert summary.p99 == pytest.approx(196.01)
    assert summary.mean == pytest.approx(sum(seconds) / 200)


def test_contenders_take_turns_and_each_begins_a_round():
    order = []

    class Recorder:
        def __init__(self, name):
            self.name = name

        def step(self):
            order.append(self.name)

    prepared = []
    seconds = take_turns({n: Recorder(n) for n in "abc"}, 4, lambda name, step: prepared.append((name, step)))
    assert "".join(order) == "abc" + "bca" + "cab" + "abc"
    assert [name for name, _ in prepared] == order
    assert prepared[3] == ("b", 1)
    assert {name: len(taken) for name, taken in seconds.items()} == {"a": 4, "b": 4, "c": 4}


def test_ratios_are_to_the_yardsticks_that_took_part():
    half, one = Summary(0.5, 1.0, 3.0, 0.7, 3.0), Summary(1.0, 4.0, 4.0, 1.0, 4.0)
    lines = optimizer.rows({"galore-torch": one, "galore-svd": half}, {"muon": "not installed: do this"})
    assert lines[1] == ["megalr GaLoreAdamW, svd", "500.0", "1000.0", "3000.0", "700.0", "3000.0"] + [
        "-",
        "-",
        "0.50",
        "0.25",
    ]
    assert lines[2] == ["megalr Muon", "not installed: do this"]
    assert all(len(line) in (2, len(optimizer.COLUMNS)) for line in lines)


def test_dear_products_are_pointed_out():
    def took(median):
        return Summary(median, median, median, median, median)

    summaries = {"adamw": took(0.1), "adamw-fused": took(0.02), "galore-svd": took(0.2), "products": took(0.05)}
    sentence = optimizer.share_of_products(summaries)
    assert "50.0 ms: 25% of megalr GaLoreAdamW, svd, 0.50 times torch AdamW, 2.50 times torch AdamW, fused" in sentence
    assert sentence.endswith("more than 2 times torch AdamW, fused before anything else is computed.")
    assert "more than" not in optimizer.share_of_products({**summaries, "adamw-fused": took(0.03)})


@pytest.mark.parametrize(
    ("kind", "is_root", "expected"),
    [
        ("all_gather", False, 300),
        ("reduce_scatter", False, 75),
        ("all_reduce", False, 150),
        ("broadcast", True, 300),
        ("broadcast", False, 0),
        ("scatter", True, 300),
        ("reduce", True, 0),
        ("gather", False, 100),
        ("all_to_all", False, 100),
        ("send", False, 100),
    ],
)
def test_bytes_of_a_collective_on_four_ranks(kind, is_root, expected):
    assert sent_bytes(kind, 100, 4, is_root=is_root) == expected


def test_one_rank_sends_nothing_and_unknown_collectives_are_refused():
    assert sent_bytes("all_reduce", 100, 1) == sent_bytes("all_gather", 100, 1) == 0
    with pytest.raises(ValueError, match="gossip"):
        sent_bytes("gossip", 100, 4)


def test_collectives_are_counted_at_the_dispatcher():
    """On ranks that talk to nobody: the backend that torch has for tests."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)
    try:
        with SentBytes() as sent:
            tensor = torch.zeros(25)  # 100 bytes
            dist.all_reduce(tensor)
            dist.all_gather_into_tensor(torch.zeros(100), tensor)
            dist.all_gather([torch.zeros(25) for _ in range(4)], tensor)
            dist.reduce_scatter_tensor(tensor, torch.zeros(100))
            dist.broadcast(tensor, 0)
            dist.broadcast(tensor, 1)
            # Five of ten numbers are for others.
            dist.all_to_all_single(torch.zeros(8), torch.zeros(10), [2, 2, 2, 2], [1, 5, 2, 2])
            dist.barrier()
        assert sent.by_kind == pytest.approx(
            {"all_reduce": 150, "all_gather": 600, "reduce_scatter": 300, "broadcast": 300, "all_to_all": 20}
        )
        assert sent.total == pytest.approx(1370)
    finally:
        dist.destroy_process_group()


def test_blocks_hold_every_contender():
    assert {member for members in BLOCKS.values() for member in members} == set(CONTENDERS)


def test_three_steps_of_a_tiny_model(shape_file, tmp_path, capsys):
    ours = ["adamw", "adamw-fused", "galore-svd", "galore-power", "fira", "apollo", "products", "muon"]
    output = tmp_path / "raw.json"
    flags = ["--models", str(shape_file), "--steps", "3", "--no-traffic", "--output", str(output)]
    optimizer.run(arguments(*flags, "--contenders", *ours), tmp_path)
    printed = capsys.readouterr().out
    assert printed.count("| optimizer | median ms |") == 2
    assert "rank 4, gap 50, 3 steps" in printed
    assert "GaLore's matrix products alone take" in printed
    seconds = json.loads(output.read_text())["seconds"][str(shape_file)]
    assert set(seconds["projected rules"]) == set(ours) - {"muon"}
    assert set(seconds["Muon"]) == {"adamw-fused", "muon"}
    assert all(len(taken) == 3 and min(taken) > 0 for block in seconds.values() for taken in block.values())


def test_a_missing_package_is_a_row_that_says_how_to_install_it(shape_file, tmp_path, capsys, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "galore_torch" else found(name, *a)
    )
    flags = ["--models", str(shape_file), "--steps", "1", "--no-traffic", "--contenders", "adamw", "galore-torch"]
    optimizer.run(arguments(*flags), tmp_path)
    expected = "| galore-torch GaLoreAdamW | not installed: pip install --no-deps galore-torch==1.0 |"
    assert expected in capsys.readouterr().out


@pytest.mark.skipif(importlib.util.find_spec("galore_torch") is None, reason="galore-torch is not installed")
def test_galore_torch_takes_part_without_bitsandbytes(shape_file, tmp_path, capsys):
    flags = ["--models", str(shape_file), "--steps", "2", "--no-traffic", "--contenders", "galore-torch", "galore-svd"]
    optimizer.run(arguments(*flags), tmp_path)
    assert "| galore-torch GaLoreAdamW | not installed" not in capsys.readouterr().out
    if importlib.util.find_spec("bitsandbytes") is None:
        assert "bitsandbytes" not in sys.modules


@pytest.mark.slow
def test_bytes_of_stage_3_on_four_processes(forked_programs):
    counted = traffic.measure()
    own = {title: sum(traffic.own_bytes(counted, title)) for title in counted}
    # Three quarters of every matrix travel to its owner and back; votes on gradients are a few bytes.
    once = 4 * 4 * MATRICES * 3 / 4  # bytes of fp32, layers
    for title in ("megalr Muon, all-reduce", "megalr GaLoreAdamW, all-reduce", "megalr Muon, reduce-scatter"):
        assert 2 * once <= own[title] <= 2 * once + 1000
    assert own["DeepSpeed Muon, all-reduce"] > 15 * once
    assert "| megalr Muon, all-reduce |" in traffic.report(counted)
