"""The pretraining program with the ready configurations of rules and projected layers, on the embedded text."""

import json
import shutil

import pytest

from megalr.rules.registry import RULES
from tests.covering import in_turn, slow_but
from tests.end_to_end.commands import ROOT, assert_same_checkpoints, losses, metrics, small_run

pytestmark = pytest.mark.distributed
TRAIN = "tests.deepspeed.pretraining:train"
STEPS = 8
OTHERS = ("lowrank", "_tp2")  # have tests of their own
READY = sorted(path.name for path in (ROOT / "ds_configs").glob("*.json"))
CONFIGS = [name for name in READY if not any(part in name for part in OTHERS)]


@pytest.fixture(scope="module")
def train(ranks, tmp_path_factory):
    """Trains with a ready configuration, once, and gives the run's folder."""
    folder = tmp_path_factory.mktemp("runs")

    def once(name, world_size=2):
        run = folder / f"{name} on {world_size}"
        if not run.exists():
            config = ["--deepspeed", str(ROOT / "ds_configs" / name), "--save-every", "4"]
            flags = [*config, *small_run(folder), "--steps", str(STEPS), "--output", str(run)]
            ranks(world_size).run(TRAIN, flags, str(folder))
        return run

    return once


def test_the_promised_configurations_are_there():
    galore = {f"zero{stage}_galore.json" for stage in range(4)}
    others = {f"zero{stage}_{rule}.json" for stage in (2, 3) for rule in ("fira", "apollo", "muon", "projected")}
    assert set(CONFIGS) == galore | others


@pytest.mark.parametrize("name", CONFIGS)
def test_ready_configuration_is_what_its_name_says(name):
    content = json.loads((ROOT / "ds_configs" / name).read_text())
    stage, method = name.removesuffix(".json").split("_")
    assert content["zero_optimization"]["stage"] == int(stage.removeprefix("zero"))
    if method == "projected":
        assert content["optimizer"]["type"] == "AdamW"
        assert content["megalr"]["parametrization"]["type"] == method
    else:
        assert RULES[content["optimizer"]["type"]].name == method
        assert "megalr" not in content


def routes(run):
    """The columns of the routing table's lines about matrices, or about R of projected layers."""
    lines = (run / "routing.txt").read_text().splitlines()
    return [line.split() for line in lines if " matrices " in line or " projected " in line]


# Every stage and every method.
DAILY = [
    "zero0_galore.json",
    "zero1_galore.json",
    "zero2_apollo.json",
    "zero2_muon.json",
    "zero3_fira.json",
    "zero3_projected.json",
]


@pytest.mark.parametrize("name", slow_but(CONFIGS, DAILY))
def test_ready_configuration_learns(train, name):
    run = train(name)
    assert losses(run)[-1] < losses(run)[0]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["perplexity"] < 0.9 * summary["perplexity_untrained"]
    rule = name.removesuffix(".json").split("_")[1]
    expected = ["projected", "adamw"] if rule == "projected" else ["matrices", rule]
    assert [route[4:6] for route in routes(run)] == [expected] * 14  # seven in each of two layers
    assert (summary["trained_parameters"] < summary["parameters"]) == (rule == "projected")  # W0 and bases are frozen


@pytest.mark.parametrize(("stage", "world_size"), in_turn([(1,), (2,), (3,)], [3, 1]))
def test_every_stage_trains_the_same_model(train, stage, world_size):
    expected = losses(train("zero0_galore.json"))
    assert losses(train(f"zero{stage}_galore.json", world_size)) == pytest.approx(expected, rel=1e-5)


def test_exchanged_bytes_are_noted(train):
    def exchanged(name):
        return {row["exchange_bytes"] for row in metrics(train(name)) if "exchange_bytes" in row}

    # At stage 3 half of each matrix lies on the other rank: it travels there and back, in fp32, and so does a vote.
    sizes = [int(m) * int(n) for _, m, _, n, *_ in routes(train("zero3_muon.json"))]
    assert exchanged("zero3_muon.json") == {4 * sum(sizes)}
    assert max(exchanged("zero2_muon.json")) < 4 * sum(sizes)


RESUMED = [
    "zero0_galore.json",
    pytest.param("zero2_galore.json", marks=pytest.mark.slow),
    "zero3_galore.json",
    "zero2_projected.json",
    pytest.param("zero3_projected.json", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("name", RESUMED)
def test_resume_is_bitwise(ranks, train, name):
    whole = train(name)
    resumed = whole.with_name(f"{whole.name} resumed")
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / f"checkpoints/step{STEPS}")
    (resumed / "checkpoints/latest").write_text("step4")
    (resumed / "summary.json").unlink()
    config = ["--deepspeed", str(ROOT / "ds_configs" / name), "--save-every", "4"]
    flags = [*config, *small_run(whole.parent), "--steps", str(STEPS), "--output", str(resumed), "--resume"]
    ranks(2).run(TRAIN, flags, str(whole.parent))
    assert losses(resumed) == losses(whole)
    assert_same_checkpoints(resumed / f"checkpoints/step{STEPS}", whole / f"checkpoints/step{STEPS}")
