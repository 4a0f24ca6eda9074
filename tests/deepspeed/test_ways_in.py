"""The three ways in train the same model, and the Trainer's checkpoints go on where they stopped."""

from __future__ import annotations

import pytest

from tests.deepspeed import training
from tests.deepspeed.ways_in import AUTO

pytestmark = pytest.mark.distributed
WORKER = "tests.deepspeed.ways_in"
STEPS = 6
MATRICES = 14  # of the two layers' attention and feed-forward weights

GALORE = {"type": "GaLoreAdamW", "params": {**AUTO, "rank": 5, "update_proj_gap": 3}}
OPTIMIZERS = {
    "GaLore": (GALORE, {}),
    "Muon": ({"type": "Muon", "params": AUTO}, {}),
    "AdamW": ({"type": "AdamW", "params": AUTO}, {}),
    "low rank": (
        {"type": "AdamW", "params": AUTO},
        {"parametrization": {"type": "low_rank", "rank": 5}, "refactorization": {"interval": 4}},
    ),
    "projected": (
        {"type": "AdamW", "params": AUTO},
        {"parametrization": {"type": "projected", "rank": 5, "update_proj_gap": 3, "share_basis": True}},
    ),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "model"
    training.dense_model().save_pretrained(folder)
    return str(folder)


def every(names, daily):
    """Each name at each stage; what is not in ``daily`` is slow."""
    combinations = [(name, stage) for name in names for stage in (0, 1, 2, 3)]
    marked = [pytest.param(*c, marks=() if c in daily else pytest.mark.slow) for c in combinations]
    return pytest.mark.parametrize(("name", "stage"), marked)


@every(OPTIMIZERS, [("Muon", 0), ("low rank", 2), ("projected", 3)])
def test_the_three_ways_train_the_same_weights(ranks, model, name, stage):
    optimizer, section = OPTIMIZERS[name]
    results = {
        way: ranks(2).run(f"{WORKER}:{way}", model, STEPS, stage, optimizer, section)
        for way in ("initialize", "instance", "callable_", "trainer")
    }
    matrices = 0 if optimizer["type"] == "AdamW" else MATRICES
    everyone = 2 if stage == 0 else 1  # at stage 0 every rank updates every matrix
    expected = results["initialize"][0][0]
    start = training.dense_model().state_dict()
    assert any((expected[n] - w).norm() > 1e-3 * w.norm() for n, w in start.items() if n in expected)
    for way, found in results.items():
        assert [updates for _, _, updates in found] == [STEPS, STEPS], way
        assert sum(calls for _, calls, _ in found) == everyone * matrices * STEPS, way
        # transformers divides the loss by the step's tokens before the sum over ranks, DeepSpeed after it
        tolerance = 1e-4 if way == "trainer" else 0
        assert found[0][0].keys() == expected.keys()
        for tensor, weights in found[0][0].items():
            error = ((weights - expected[tensor]).norm() / expected[tensor].norm()).item()
            assert error <= tolerance, f"{way}, {tensor}: {error:.1e}"


@pytest.mark.parametrize("stage", [2, 3])
def test_what_a_user_sees(ranks, model, stage):
    """All parameters may be given, the schedule starts an update earlier than DeepSpeed's, and the log tells of us."""
    first, other = ranks(2).run(f"{WORKER}:plugged_in", model, stage, as_stock=False)
    assert "untested optimizer" not in first["log"] and "before it has started" not in first["log"]
    assert "galore: 14 matrices with" in first["summary"] and f"megalr trains\n{first['summary']}" in first["log"]
    assert '"lr": 0.003 in optimizer.params is never used' in first["log"]
    assert "megalr" not in other["log"] and "never used" not in other["log"]
    assert all(len(set(rates.values())) == 1 for rates in first["rates"])
    rates = [rates["matrices"] for rates in first["rates"]]
    assert rates == pytest.approx([0, 2.31e-4, 3.67e-4], rel=2e-3)
    moves = {"before": (False, (-1,)), "as it is": (True, None), "ahead": (True, ())}
    for name in ("before",) if stage == 3 else ("as it is", "ahead"):
        as_stock, move = moves[name]
        found = ranks(2).run(f"{WORKER}:plugged_in", model, stage, as_stock=as_stock, move=move)[0]
        assert ("untested optimizer" in found["log"]) == ("before it has started" in found["log"]) == as_stock
        assert [each["matrices"] for each in found["rates"]] == (rates if name == "ahead" else [0, 0, rates[1]])


@every(["GaLore", "low rank", "projected"], [("projected", 0), ("GaLore", 3)])
def test_trainer_resumes_bitwise_and_evaluation_changes_nothing(ranks, model, tmp_path, name, stage):
    run = ranks(2).run(f"{WORKER}:trainer_resume", model, str(tmp_path), stage, *OPTIMIZERS[name])
    assert run == [[], []]


@pytest.mark.parametrize("stage", [0, pytest.param(2, marks=pytest.mark.slow), 3])
def test_a_checkpoint_loaded_and_saved_before_any_update_loses_nothing(ranks, model, tmp_path, stage):
    assert ranks(2).run(f"{WORKER}:stock_resume", model, str(tmp_path), stage, *OPTIMIZERS["GaLore"]) == [[], []]


def test_an_engine_with_another_optimizer_says_what_to_write(ranks, model):
    for said in ranks(2).run(f"{WORKER}:foreign", model, [0, 2, 3])[0]:
        assert "has megalr.refactorization, which only megalr's optimizer carries out" in said


def test_trainer_drops_what_is_passed_as_optimizers(ranks, model):
    """The reason for ``trainer_optimizer``: should transformers change its mind, the README can be shortened."""
    for found in ranks(2).run(f"{WORKER}:trainer_settings", model, 2, as_optimizers=True):
        assert found["optimizer"] == "AdamW" and found["calls"] == 0


@pytest.mark.parametrize("stage", [2, 3])
def test_trainer_with_the_optimizer_on_the_cpu_keeps_the_rule(ranks, model, stage):
    """accelerate exchanges an optimizer for DeepSpeed's CPU Adam unless the JSON forbids it."""
    zero = {"offload_optimizer": {"device": "cpu"}}
    for found in ranks(2).run(f"{WORKER}:trainer_settings", model, stage, zero=zero):
        assert found["optimizer"] == "MegalrOptimizer" and found["calls"] == MATRICES


def test_trainer_with_a_schedule_of_deepspeed(ranks, model):
    params = {"warmup_num_steps": "auto", "warmup_max_lr": "auto", "warmup_min_lr": "auto", "total_num_steps": "auto"}
    sections = {"scheduler": {"type": "WarmupDecayLR", "params": params}}
    for found in ranks(2).run(f"{WORKER}:trainer_settings", model, 2, sections=sections):
        assert found["optimizer"] == "MegalrOptimizer" and found["calls"] == MATRICES
        assert found["schedule"] == "WarmupDecayLR"
