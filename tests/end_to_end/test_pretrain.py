"""The user's command from its start to its end, and everything that it leaves."""

import json
import math
import shutil

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoTokenizer, LlamaForCausalLM

from tests.end_to_end.commands import (
    CONFIGS,
    EVALUATE,
    PRETRAIN,
    SHORT_TEXT,
    losses,
    make_pretrain,
    metrics,
    perplexity,
    plain,
    run,
    small_run,
    torchrun,
)

STEPS = 30


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """`make pretrain`, hence DeepSpeed's launcher, as a user starts it: two processes, stage 2, an export."""
    folder = tmp_path_factory.mktemp("pretrain")
    flags = [*small_run(folder), "--steps", str(STEPS), "--eval-every", "15", "--save-every", "20"]
    flags += ["--export", "dense", "--galore-compatible-eval"]
    result = run(make_pretrain(folder, flags), folder, warm=False, env={"LOCAL_SIZE": "2"})
    assert result.code == 0, result.output
    return folder, result.output


@pytest.fixture(scope="module")
def summary(finished):
    folder, _ = finished
    return json.loads((folder / "runs/zero2_lowrank/summary.json").read_text())


def test_the_folder_holds_what_was_promised(finished):
    folder, _ = finished
    made = folder / "runs/zero2_lowrank"
    files = {path.name for path in made.iterdir()}
    assert files == {
        "routing.txt",
        "run.json",
        "metrics.jsonl",
        "checkpoints",
        "tensorboard",
        "loss.png",
        "summary.json",
    }
    assert (made / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in (made / "tensorboard").iterdir()][0].startswith("events.out.tfevents")
    assert (made / "checkpoints/latest").read_text() == f"step{STEPS}"
    assert {path.name for path in (made / "checkpoints").iterdir() if path.is_dir()} == {"step20", f"step{STEPS}"}
    settings = json.loads((made / "run.json").read_text())
    assert settings["processes"] == 2
    assert settings["deepspeed"]["train_batch_size"] == 12
    assert settings["deepspeed"]["megalr"]["parametrization"]["rank"] == 8
    assert settings["model"]["hidden_size"] == 32


def test_every_step_and_evaluation_has_a_row(finished):
    folder, _ = finished
    rows = metrics(folder / "runs/zero2_lowrank")
    training = [row for row in rows if "loss" in row]
    assert [row["step"] for row in training] == list(range(1, STEPS + 1))
    assert [row["tokens"] for row in training] == [12 * 32 * step for step in range(1, STEPS + 1)]
    assert [row["step"] for row in rows if "eval_loss" in row] == [0, 15, STEPS]
    assert all(row["grad_norm"] > 0 and row["tokens_per_second"] > 0 for row in training)
    assert max(row["lr"] for row in training) == pytest.approx(3e-3, rel=0.05)


def test_tensorboard_gets_the_same_numbers(finished, summary):
    folder, _ = finished
    events = EventAccumulator(str(folder / "runs/zero2_lowrank/tensorboard")).Reload()
    trained = [event.value for event in events.Scalars("Train/Samples/train_loss")]
    assert trained == pytest.approx(losses(folder / "runs/zero2_lowrank"))
    last = events.Scalars("Eval/Samples/perplexity")[-1]
    assert (last.step, last.value) == (12 * STEPS, pytest.approx(summary["perplexity"]))


def test_the_model_learns(summary):
    assert summary["perplexity"] < 0.6 * summary["perplexity_untrained"]
    assert summary["perplexity_untrained"] == pytest.approx(4096, rel=0.05)
    assert 100 < summary["perplexity_unigram"] < 4096
    assert summary["perplexity_galore_compatible"] < summary["perplexity"]
    assert summary["perplexity"] == pytest.approx(math.exp(summary["loss"]))


def test_the_numbers_are_printed_once(finished, summary):
    _, output = finished
    lines = output.splitlines()
    assert sum(line.startswith("held-out perplexity  ") for line in lines) == 1
    for key in ("perplexity", "perplexity_untrained", "perplexity_unigram", "perplexity_galore_compatible"):
        assert f"{summary[key]:,.2f}" in output
    for words in (
        "fp32 masters",
        "optimizer state",
        "peak memory",
        "tokens per second",
        "TFLOP/s per rank",
        "precision: fp32",
    ):
        assert sum(words in line for line in lines) == 1, words
    assert "Traceback" not in output


def test_bytes_per_rank_are_those_of_two_partitions(summary):
    held, parameters = summary["bytes_per_rank"], summary["parameters"]
    assert held["weights"] == pytest.approx(4 * parameters, rel=1e-3)
    assert held["masters"] == pytest.approx(4 * parameters / 2, rel=1e-3)
    assert held["optimizer_state"] == pytest.approx(8 * parameters / 2, rel=1e-3)


def test_a_run_a_checkpoint_and_the_export_score_the_same(finished, summary):
    folder, _ = finished
    made = "runs/zero2_lowrank"
    text = [*SHORT_TEXT[:2], *SHORT_TEXT[4:]]
    for what in ([made], [f"{made}/checkpoints/step{STEPS}"], ["dense", *text]):
        result = run([*plain(), EVALUATE, *what], folder, warm=what != [made])
        assert result.code == 0, result.output
        assert perplexity(result.output) == pytest.approx(summary["perplexity"], rel=1e-5)


def test_another_number_of_processes_and_stage_go_on(finished):
    folder, _ = finished
    shutil.copytree(folder / "runs/zero2_lowrank", folder / "copy")
    flags = ["--deepspeed", CONFIGS / "zero3_lowrank.json", *small_run(folder), "--steps", str(STEPS + 5)]
    flags += ["--output", "copy", "--resume"]
    result = run([*plain(), PRETRAIN, *flags], folder)
    assert result.code == 0, result.output
    assert "processes: 2 -> 1" in result.output and "zero_optimization.stage: 2 -> 3" in result.output
    assert [row["step"] for row in metrics(folder / "copy") if "loss" in row] == list(range(1, STEPS + 6))


def test_torchrun_as_a_user_starts_it_goes_on(finished):
    folder, _ = finished
    shutil.copytree(folder / "runs/zero2_lowrank", folder / "under torchrun")
    flags = ["--deepspeed", CONFIGS / "zero1_lowrank.json", *small_run(folder), "--steps", str(STEPS + 2)]
    flags += ["--output", "under torchrun", "--resume"]
    result = run([*torchrun(2), PRETRAIN, *flags], folder, warm=False)
    assert result.code == 0, result.output
    assert "zero_optimization.stage: 2 -> 1" in result.output and "processes:" not in result.output
    assert [row["step"] for row in metrics(folder / "under torchrun") if "loss" in row] == list(range(1, STEPS + 3))


def test_another_batch_cannot_go_on(finished):
    folder, _ = finished
    flags = ["--deepspeed", CONFIGS / "zero2_lowrank.json", *small_run(folder), "--steps", "60", "--resume"]
    result = run([*plain(), PRETRAIN, *flags, "--batch-size", "5"], folder)
    assert result.code == 2, result.output
    assert "train_batch_size: 12 -> 5" in result.output
    assert (folder / "runs/zero2_lowrank/summary.json").exists()


def test_the_export_is_an_ordinary_model(finished, summary):
    folder, _ = finished
    model = LlamaForCausalLM.from_pretrained(folder / "dense")
    tokenizer = AutoTokenizer.from_pretrained(folder / "dense")
    names = set(model.state_dict())
    assert "model.layers.0.self_attn.q_proj.weight" in names
    assert not [name for name in names if name.endswith((".A", ".B"))]
    assert torch.linalg.matrix_rank(model.model.layers[0].mlp.up_proj.weight) == 8
    assert len(tokenizer) == 4096
    assert model.config.use_cache is True
    assert summary["export_logit_difference"] < 1e-4
