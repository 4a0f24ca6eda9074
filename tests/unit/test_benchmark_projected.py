"""The benchmark of projected layers: its formula by hand, its tables, and runs on a tiny shape."""

import argparse
import json

import pytest
import torch
from transformers import LlamaConfig

from benchmarks import projected, projected_counts, projected_traffic
from benchmarks.projected_counts import Groups, Sent, groups_of, held_bytes, mean_sent, sent_by_formula
from benchmarks.projected_methods import COUNTED, TITLES, prepare
from benchmarks.projected_training import TIME_COLUMNS, Training, time_rows
from benchmarks.timing import Summary
from megalr.memory.formulas import RankBytes
from megalr.rules.galore import GaLore
from megalr.train.models import build_model
from tests.covering import slow_but

HIDDEN, WIDE, LAYERS, VOCABULARY = 16, 40, 3, 50
SHAPE = {
    "hidden_size": HIDDEN,
    "intermediate_size": WIDE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "vocab_size": VOCABULARY,
}
RANK, GAP = 4, 10
MATRICES = LAYERS * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * WIDE)  # elements
R = LAYERS * RANK * (4 * HIDDEN + 2 * WIDE + HIDDEN)  # elements of all R with the basis on the input's side
BASES = LAYERS * RANK * (6 * HIDDEN + WIDE)  # elements of all bases, one a layer
SHARED_BASES = LAYERS * RANK * (3 * HIDDEN + WIDE)  # q, k and v have one, gate and up have one
REST = 2 * VOCABULARY * HIDDEN + (2 * LAYERS + 1) * HIDDEN  # elements of embedding, head and norms


def config():
    return LlamaConfig(**SHAPE)


def arguments(*flags):
    parser = argparse.ArgumentParser()
    projected.add_arguments(parser)
    return parser.parse_args(list(flags))


@pytest.fixture
def shape_file(tmp_path):
    path = tmp_path / "shape.json"
    path.write_text(json.dumps({"model_type": "llama", **SHAPE}))
    return path


def test_what_full_rank_sends():
    sent = mean_sent(groups_of(config(), "adamw", RANK), 4, GAP)
    assert sent.reduced == 2 * 3 / 4 * (4 * (MATRICES + REST) + 40)
    # Of each of the groups - matrices, embedding with head, norms - a rank has a quarter, and sends it to three others.
    assert sent.gathered == 3 * 4 * (MATRICES / 4 + 2 * VOCABULARY * HIDDEN / 4 + 28)
    assert sent.moved == sent.refreshes == 0
    alone = mean_sent(groups_of(config(), "adamw", RANK, matrices_alone=True), 4, GAP)
    assert alone.total == 3 * 4 * (MATRICES / 2 + MATRICES / 4) + 60


@pytest.mark.parametrize(("method", "bases", "count"), [("input", BASES, 7 * LAYERS), ("shared", SHARED_BASES, 12)])
def test_what_projected_layers_send(method, bases, count):
    groups = groups_of(config(), method, RANK, matrices_alone=True)
    assert len(groups.bases) == count
    sent = mean_sent(groups, 4, GAP)
    assert sent.reduced == 2 * 3 / 4 * (4 * R + 40)
    assert sent.gathered == 3 * R
    refreshed = 2 * 3 / 4 * 4 * (3 * R + bases + 4 * count) + 3 / 4 * 4 * bases
    assert sent.refreshes == pytest.approx(refreshed / GAP)
    ranks = [sent_by_formula(groups, 4, rank, GAP) for rank in range(4)]
    assert sum(rank.total for rank in ranks) / 4 == pytest.approx(sent.total)


def test_a_cut_matrix_of_a_rule_travels_to_its_owner_and_back():
    # Ranks have 10 elements each: "a" lies on rank 0, "b" with 2 elements there and 10 on rank 1, whose load is less.
    groups = Groups(trained=[{"a": (4, 2), "b": (4, 3)}], frozen=[], rule=GaLore(rank=2), treated=[0])
    first, second = (sent_by_formula(groups, 2, rank, GAP) for rank in range(2))
    assert first.moved == second.moved == 4 * 2
    assert first.refreshes == second.refreshes == 0


def test_one_rank_sends_nothing():
    assert sent_by_formula(groups_of(config(), "input", RANK), 1, 0, GAP).total == 0


def test_what_ranks_hold():
    dense = held_bytes(groups_of(config(), "adamw", RANK, matrices_alone=True), 4)
    assert dense.masters == MATRICES
    assert dense.optimizer_state == 2 * MATRICES
    assert dense.weights == 4 * MATRICES
    ours = held_bytes(groups_of(config(), "shared", RANK, matrices_alone=True), 4)
    assert ours.masters == R
    assert ours.optimizer_state == 2 * R
    assert ours.weights == 4 * (MATRICES + R + SHARED_BASES)
    assert ours.gradients < dense.gradients / 3
    rule = held_bytes(groups_of(config(), "galore", RANK, matrices_alone=True), 4)
    assert rule.masters == MATRICES
    assert rule.gradients == dense.gradients
    assert rule.optimizer_state < dense.optimizer_state
    whole = held_bytes(groups_of(config(), "shared", RANK), 4)
    assert whole.weights == ours.weights + 4 * REST


@pytest.mark.parametrize("method", slow_but(TITLES, ["shared", "std"]))
def test_activations_of_all_layers_follow_from_two(method):
    model = build_model(config(), seed=0)
    prepare(model, method, RANK, GAP)
    direct = projected_counts.saved_bytes(model, projected_counts.random_tokens(config(), 2, 8))
    assert projected_counts.saved_activations(config(), method, RANK, 2, 8) == direct


def test_saved_bytes_of_one_layer():
    class Squares(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(3))

        def forward(self, input_ids, labels):
            return argparse.Namespace(loss=(input_ids * self.weight).square().sum())

    # The product with the weight saves the input, which is not counted, and the weight; the square its 2 x 3 operand.
    assert projected_counts.saved_bytes(Squares(), torch.ones(2, 3)) == 6 * 4


@pytest.mark.slow
def test_activations_shrink_with_the_input_side():
    saved = {m: projected_counts.saved_activations(config(), m, RANK, 2, 8) for m in TITLES}
    assert saved["shared"] < saved["input"] < saved["std"] <= saved["adamw"] == saved["galore"]


def test_rows_and_verdict():
    sent = {(m, True): Sent(reduced=k, gathered=k, moved=0, refreshes=k) for m, k in (("adamw", 4), ("input", 1))}
    assert [row[-1] for row in projected.sent_rows(sent)] == ["1.000", "0.250"]
    held = {("input", False): RankBytes(weights=1, gradients=2, masters=3, optimizer_state=4)}
    (row,) = projected.held_rows(held)
    assert row[0] == "projected, input; whole model"
    assert len(row) == len(projected.HELD_COLUMNS)
    assert len(projected.sent_rows(sent)[0]) == len(projected.SENT_COLUMNS)
    sentence = projected.verdict("Traffic", {"input": 0.25, "shared": 0.3}, 0.27)
    assert "aim at most 0.27: projected, input 0.250 (met)" in sentence
    assert "shared basis 0.300 (missed)" in sentence


def test_rows_of_times():
    rows = time_rows({"adamw": [2.0, 2.0], "galore": [4.0, 4.0], "input": [1.0, 3.0, 1.0]})
    assert rows[2] == ["projected, input", "1.000", "2.960", "3.000", "0.500", "0.250", "2.96"]
    assert all(len(row) == len(TIME_COLUMNS) for row in rows)
    assert time_rows({"std": [1.0]})[0][4:6] == ["-", "-"]
    assert Summary.of([1.0, 3.0, 1.0]).median == 1.0


def test_bytes_that_disagree_are_an_error():
    gap = projected_traffic.small_shape(1)[1]
    with pytest.raises(projected_traffic.FormulaError, match="rank 0, step 0: 1"):
        projected_traffic.check({"adamw": [[1.0] * 2 * gap] * 4}, layers=1)


def test_later_refreshes_are_power_steps():
    tokens = projected_counts.random_tokens(config(), 1, 8)
    training = Training(config(), "input", RANK, GAP, lambda: tokens)
    training.step()
    before = training._optimizer.refreshes
    training.pass_first_gap()
    assert before == 3  # of 21 bases in a gap of 10
    assert training._optimizer.refreshes == 7 * LAYERS
    training.step()
    assert training._optimizer.refreshes == 7 * LAYERS + 2
    assert len(training.cpu_seconds) == 2


def test_both_parts_on_a_tiny_shape(shape_file, tmp_path, capsys):
    output = tmp_path / "raw.json"
    flags = ["--models", str(shape_file), "--model", str(shape_file), "--sequences", "2", "--length", "8"]
    flags += ["--no-verify", "--peak", "--steps", "3", "--gap", "2", "--output", str(output)]
    projected.run(arguments(*flags), tmp_path)
    printed = capsys.readouterr().out
    raw = json.loads(output.read_text())
    assert "bytes that a rank sends per step, by the formula" in printed
    assert "Traffic of the matrices / full rank, aim at most 0.27: projected, input" in printed
    assert "Median / that of the rule, aim at most 0.9: " in printed
    assert set(raw["counts"]["sent"][str(shape_file)]) == {
        f"{TITLES[method]}; {scope}" for method in COUNTED for scope in ("matrices", "whole model")
    }
    for kind in ("wall", "cpu"):
        assert {method: len(taken) for method, taken in raw["seconds"][kind].items()} == dict.fromkeys(TITLES, 3)


@pytest.mark.slow
def test_peak_of_a_fresh_process(shape_file, tmp_path):
    measured = projected.peak_memory(str(shape_file), tmp_path, "shared", 1, 8, GAP)
    assert 0 < measured["start"] <= measured["peak"]


@pytest.mark.slow
def test_four_processes_send_what_the_formula_says(forked_programs):
    said = projected_traffic.check(projected_traffic.measure(("galore", "shared")))
    assert "matrices that are cut have travelled, too" in said
