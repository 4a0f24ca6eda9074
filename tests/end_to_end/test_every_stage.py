"""Every ZeRO stage at every world size trains the same model."""

import pytest

from tests.end_to_end.commands import PRETRAIN, losses, metrics, plain, run, small_run, torchrun, write_config

STEPS = 12
# Both events come within the run.
EVENTS = {
    "refactorization": {"interval": 5},
    "momentum_reset": {"interval": 4, "scope": "factors", "warmup_steps": 2},
}


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """Trains at a stage and world size, once, and gives the run's folder."""
    folder = tmp_path_factory.mktemp("stages")
    done = {}

    def once(stage, world_size, **sections):
        key = (stage, world_size, str(sections))
        if key not in done:
            name = f"run{len(done)}"
            config = write_config(folder / f"{name}.json", stage, megalr=EVENTS, **sections)
            launcher = plain() if world_size == 1 else torchrun(world_size)
            command = [*launcher, PRETRAIN, "--deepspeed", config, *small_run(folder), "--steps", str(STEPS)]
            result = run([*command, "--output", name], folder)
            assert result.code == 0, result.output
            done[key] = folder / name
        return done[key]

    return once


def check_same(one, other, rel):
    assert losses(one) == pytest.approx(losses(other), rel=rel)
    ends = [[row["eval_loss"] for row in metrics(folder) if "eval_loss" in row] for folder in (one, other)]
    assert ends[0] == pytest.approx(ends[1], rel=rel)


def test_stage_3_on_two_processes_trains_as_one_process_without_zero(train):
    one = train(0, 1)
    check_same(train(3, 2), one, rel=1e-5)
    events = {row["step"]: row["events"] for row in metrics(one) if "events" in row}
    assert events == {
        4: ["momentum_reset"],
        5: ["refactorization"],
        8: ["momentum_reset"],
        10: ["refactorization"],
        12: ["momentum_reset"],
    }


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_stage_and_world_size(train, stage, world_size):
    check_same(train(stage, world_size), train(0, 1), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_accumulation_changes_nothing(train, world_size):
    check_same(train(2, world_size, gradient_accumulation_steps=4), train(0, 1), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16(train, stage):
    check_same(train(stage, 2, bf16={"enabled": True}), train(0, 1), rel=2e-3)
