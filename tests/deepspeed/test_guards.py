"""Guards: a bad update is skipped by all ranks as if it had never been, and ranks that drift apart are named."""

from __future__ import annotations

import json
import math

import pytest
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split

from tests.deepspeed import projecting
from tests.end_to_end.commands import SMALL_MODEL, metrics, small_run, write_config
from tests.references.parametrizations import velora

pytestmark = pytest.mark.distributed
GUARDING = "tests.deepspeed.guarding"
BF16 = {"bf16": {"enabled": True}}
UNCHECKED = {"bf16": {"enabled": True, "check_grad_overflow": False}}
FINITE = "nan, finite gradients"


@pytest.mark.parametrize(
    ("method", "stage", "world_size", "kind", "changes"),
    [
        ("GaLoreAdamW", 0, 2, "nan", {}),
        ("GaLoreAdamW", 1, 3, "spike", {}),
        ("GaLoreAdamW", 2, 2, FINITE, {"accumulation": 4}),
        ("GaLoreAdamW", 3, 3, "gradient", {}),
        ("low_rank", 0, 2, "spike", {}),
        ("low_rank", 1, 2, "gradient", {}),
        ("low_rank", 2, 2, "nan", {}),
        ("low_rank", 3, 2, FINITE, {}),
        ("projected", 0, 2, FINITE, {}),
        ("projected", 1, 2, "nan", {}),
        ("projected", 2, 2, "spike", {}),
        ("projected", 3, 2, "spike", {}),
        ("Muon", 0, 2, "gradient", {}),
        ("Muon", 1, 2, FINITE, {}),
        ("Muon", 2, 2, "spike", {"accumulation": 4}),
        ("Muon", 3, 2, "nan", {}),
        ("GaLoreAdamW", 0, 2, "spike", BF16),
        ("low_rank", 2, 2, "nan", UNCHECKED),
        ("projected", 3, 2, "nan", BF16),
        ("Muon", 1, 2, FINITE, BF16),
        ("Muon", 1, 2, "spike", {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}),
    ],
)
def test_a_bad_update_never_was(ranks, method, stage, world_size, kind, changes):
    for found in ranks(world_size).run(f"{GUARDING}:skip", method, stage, kind, **changes):
        assert found["changed"] == []
        assert found["events"] == ["skipped"]
        assert found["skipped"] == (1, False, True)  # as DeepSpeed counts, and as accelerate asks
        assert (found["counts"], found["counts after"]) == ((1, 1), (1, 0))
        assert found["reason"].startswith(
            {"gradient": "gradient is not finite", "spike": "loss "}.get(kind, "loss is nan")
        )
        assert ("deviations above the mean" in found["reason"]) == (kind == "spike")
        assert found["differs"] == []  # the next update is that of a run that never saw the bad batch
        assert found["moved"]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_first_update_may_be_bad(ranks, stage):
    for found in ranks(2).run(f"{GUARDING}:skip", "GaLoreAdamW", stage, FINITE, good=0):
        assert (found["changed"], found["differs"], found["moved"]) == ([], [], True)
        assert found["events"] == ["skipped"]


@pytest.mark.parametrize(("stage", "kind"), [(0, "gradient"), (1, "spike"), (2, "nan"), (3, FINITE)])
def test_too_many_in_a_row_end_the_run_on_all_ranks(ranks, stage, kind):
    found = ranks(3).run(f"{GUARDING}:exhaust", stage, kind)
    assert len(set(found)) == 1
    count, message = found[0]
    assert count == 3
    assert "3 updates in a row were skipped, more than megalr.guards.max_skipped = 2" in message
    assert "the last because its gradient is not" in message or "the last because its loss" in message


@pytest.mark.parametrize(
    ("method", "stage"),
    [("GaLoreAdamW", 0), ("GaLoreAdamW", 3), ("low_rank", 1), ("projected", 2), ("projected", 3), ("Muon", 2)],
)
def test_healthy_ranks_agree(ranks, method, stage):
    assert ranks(2).run(f"{GUARDING}:healthy", method, stage) == [5] * 2
    assert ranks(3).run(f"{GUARDING}:healthy", method, stage, **BF16) == [5] * 3


@pytest.mark.parametrize(
    ("stage", "parametrization"),
    [
        (0, None),
        pytest.param(1, {"type": "low_rank", "rank": 5}, marks=pytest.mark.slow),
        (2, {"type": "sltrain", "rank": 5, "density": 0.1}),
        (3, {"type": "projected", "rank": 5, "update_proj_gap": 2}),
    ],
)
def test_healthy_tensor_parallel_ranks_agree(ranks, stage, parametrization):
    assert ranks(4).run(f"{GUARDING}:healthy_tensor", 2, stage, parametrization) == [4] * 4


@pytest.mark.parametrize(
    ("method", "stage", "where"),
    [("GaLoreAdamW", 0, "mlp_tall.weight"), ("low_rank", 0, "lm_head.weight"), ("projected", 2, "mlp_wide.weight")],
)
def test_a_flipped_bit_is_named(ranks, method, stage, where):
    found = ranks(3).run(f"{GUARDING}:flip", method, stage, where, 1)
    assert len(set(found)) == 1
    count, message = found[0]
    assert count == 2  # at the next comparison
    assert f"rank 1: {where} (1 of " in message
    assert "rank 0:" not in message and "rank 2:" not in message


def test_a_resumed_guard_decides_alike(ranks):
    for equal, known, skipped, in_a_row, (first, second) in ranks(2).run(f"{GUARDING}:go_on", 2):
        assert equal
        assert (known, skipped, in_a_row) == (3, 1, 1)
        assert first == second is not None


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("section", [{"activations": velora.SECTION}, {"parametrization": projecting.ODD}])
@pytest.mark.parametrize("bad", [0, 2])
def test_without_a_guard_an_update_that_deepspeed_skips_never_was(ranks, stage, section, bad):
    assert ranks(2).run(f"{GUARDING}:unguarded", stage, section, bad) == [([], 4)] * 2


def test_an_update_ends_where_the_user_says(ranks):
    for updates, losses, off in ranks(2).run(f"{GUARDING}:boundaries_of_the_user"):
        assert (updates, losses) == (2, 2)
        assert math.isclose(off, 0.0, abs_tol=1e-6)


def test_a_job_that_initializes_itself_may_attach_a_guard(ranks):
    for events, reason, loss in ranks(2).run(f"{GUARDING}:of_a_job_of_its_own"):
        assert (events, reason) == (["skipped"], "loss is nan")
        assert loss is None  # none went through the engine


@pytest.mark.parametrize(("saves", "words"), [("2", "the last checkpoint is that of step 4"), ("2h", "no checkpoint")])
def test_the_launcher_notes_what_is_skipped_and_gives_up(ranks, tmp_path, saves, words):
    """After the first update, of a rate beyond all reason, no loss is a number."""
    config = write_config(
        tmp_path / "hot.json",
        megalr={"guards": {"max_skipped": 3}, "momentum_reset": None, "refactorization": None},
        optimizer={"type": "AdamW", "params": {"lr": 1e30}},
    )
    flags = ["--deepspeed", str(config), *small_run(tmp_path), "--steps", "20", "--log-every", "7"]
    flags += ["--output", "run", "--save-every", saves]
    found = ranks(2).run(f"{GUARDING}:launcher_ends", flags, str(tmp_path))
    assert found[0] == found[1]
    assert found[0].startswith("step 5: 4 updates in a row were skipped, more than megalr.guards.max_skipped = 3")
    assert words in found[0]

    rows = {row["step"]: row for row in metrics(tmp_path / "run") if "loss" in row}
    assert list(rows) == [2, 3, 4, 5]
    for row in rows.values():
        assert row["events"] == ["skipped"]
        assert row["skipped"] == f"loss is {row['loss']}"
        assert not math.isfinite(row["loss"])


def test_a_run_that_makes_no_update_replaces_no_other(ranks, tmp_path):
    """From its first loss on no number is one."""
    guards = {"momentum_reset": None, "refactorization": None, "guards": {"max_skipped": 1}}
    config = write_config(tmp_path / "never.json", megalr=guards)
    flags = ["--deepspeed", str(config), *small_run(tmp_path), "--steps", "4", "--output", "run", "--overwrite"]
    (tmp_path / "small.json").write_text(json.dumps({**SMALL_MODEL, "rms_norm_eps": -1e9}))
    run = tmp_path / "run"
    run.mkdir()
    old = {"metrics.jsonl": '{"step": 1}', "run.json": '{"command": "pretrain.py", "deepspeed": {}}'}
    for name, content in old.items():
        (run / name).write_text(content)
    found = ranks(2).run(f"{GUARDING}:launcher_ends", flags, str(tmp_path))
    assert found[0].startswith("step 2: 2 updates in a row were skipped, more than megalr.guards.max_skipped = 1")
    assert {path.name: path.read_text() for path in run.iterdir()} == old


def test_an_update_without_a_token_to_predict_is_none(ranks, tmp_path):
    """Documents that the tokenizer makes nothing of are their end alone. And a run keeps its held-out text."""
    words = Tokenizer(WordLevel({"</s>": 0, "known": 1, "words": 2}, unk_token="known"))
    words.pre_tokenizer = Split(Regex("x+"), "removed")
    words.add_special_tokens(["</s>"])
    words.save(str(tmp_path / "words.json"))
    (tmp_path / "text.jsonl").write_text('{"text": "known"}\n{"text": "x"}\n{"text": "x"}\n' * 6)
    for name in ("held", "other"):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"text": "{name}"}}\n' * len(name))
    flags = [
        "--deepspeed",
        str(write_config(tmp_path / "c.json")),
        *small_run(tmp_path),
        "--no-pack",
        "--batch-size",
        "2",
    ]
    flags += ["--dataset", "text.jsonl", "--tokenizer", "words.json", "--sequence-length", "3", "--output", "run"]
    held = ["--eval-dataset", "held.jsonl"]
    assert ranks(2).run(f"{GUARDING}:launcher_ends", [*flags, *held, "--steps", "9"], str(tmp_path)) == ["", ""]

    rows = [row for row in metrics(tmp_path / "run") if "loss" in row]
    empty = [row for row in rows if row["loss"] is None]
    assert 3 <= len(empty) < 9 and len(rows) == 9  # six documents of two tokens, twelve of one
    assert {row["skipped"] for row in empty} == {"batch has no token to predict"}
    assert all(math.isfinite(row["loss"]) and "skipped" not in row for row in rows if row not in empty)
    assert [row["epoch"] for row in rows] == [round(step / 9, 6) for step in range(1, 10)]

    for changed, start in (
        (["--eval-dataset", "other.jsonl"], "the run was evaluated on another held-out text"),
        ([*held, "--max-eval-tokens", "4"], "the run was evaluated on another held-out text"),
        (held, ""),
    ):
        again = [*flags, *changed, "--steps", "10", "--resume"]
        for found in ranks(2).run(f"{GUARDING}:launcher_ends", again, str(tmp_path)):
            assert found.startswith(start) and bool(found) == bool(start)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["epochs"] == round(10 / 9, 6)


def test_checkpoints_by_the_clock_of_rank_0(ranks, tmp_path):
    flags = ["--deepspeed", str(write_config(tmp_path / "c.json")), *small_run(tmp_path), "--steps", "3"]
    for every, saved in (("0.0001s", {"step1", "step2", "step3"}), ("1h", {"step3"})):
        words = [*flags, "--output", every, "--save-every", every]
        assert ranks(2).run(f"{GUARDING}:launcher_ends", words, str(tmp_path)) == ["", ""]
        assert {folder.name for folder in (tmp_path / every / "checkpoints").iterdir() if folder.is_dir()} == saved


def flags_of_four_steps(tmp_path, output):
    monitor = {"enabled": True, "output_path": "auto", "job_name": "auto"}  # DeepSpeed opens its files in each step
    config = write_config(tmp_path / "c.json", csv_monitor=monitor)
    flags = ["--deepspeed", str(config), *small_run(tmp_path), "--steps", "4", "--save-every", "2", "--log-every", "1"]
    return [*flags, "--batch-size", "2", "--output", output]


def test_a_run_whose_folder_is_moved_ends_and_goes_on_from_there(ranks, tmp_path):
    flags = flags_of_four_steps(tmp_path, "run")
    found = ranks(2).run(f"{GUARDING}:launcher_loses", "run", flags, str(tmp_path))
    assert found[0][0] == found[1][0]
    assert found[0][0].startswith(f"run was moved to {tmp_path / 'kept'} while this run wrote there")
    assert f"--output {tmp_path / 'kept'}, and add --resume" in found[0][0]
    assert not (tmp_path / "run").exists()
    assert [row["step"] for row in metrics(tmp_path / "kept") if "loss" in row] == [1, 2]

    again = [*flags_of_four_steps(tmp_path, "kept"), "--resume"]
    assert ranks(2).run(f"{GUARDING}:launcher_ends", again, str(tmp_path)) == ["", ""]
    assert [row["step"] for row in metrics(tmp_path / "kept") if "loss" in row] == [1, 2, 3, 4]
    assert (tmp_path / "kept/summary.json").exists()


@pytest.mark.slow
def test_checkpoints_that_are_moved_away_are_missed(ranks, tmp_path):
    flags = flags_of_four_steps(tmp_path, "run")
    ((error, said),) = ranks(1).run(f"{GUARDING}:launcher_loses", "run/checkpoints", flags, str(tmp_path))
    assert error == ""
    assert "run/checkpoints was moved or deleted, with what was saved: it is made anew" in said
    assert (tmp_path / "kept/latest").read_text() == "step2"
    assert (tmp_path / "run/checkpoints/latest").read_text() == "step4"
