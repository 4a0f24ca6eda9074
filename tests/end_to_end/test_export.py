"""Parametrizations that have dense weights, trained by the program and exported with an event behind them."""

import json

import pytest

from tests.end_to_end.commands import PRETRAIN, plain, run, small_run, write_config

pytestmark = pytest.mark.slow
SECTIONS = {
    "sltrain": {},
    "lora": {},
    "relora": {"merge_every": 2, "restart_warmup_steps": 1},
    "mora": {"rank": 2},
    "loro": {"exact_every": 2, "restart_warmup_steps": 1},
    "switchlora": {"switch_interval": 10},
}


@pytest.mark.parametrize("kind", SECTIONS)
def test_the_export_computes_what_the_trained_model_does(tmp_path, kind):
    """Under ZeRO 3 in one process; the program itself compares the logits of the two models."""
    section = {
        "parametrization": {"type": kind, "rank": 8, **SECTIONS[kind]},
        "refactorization": None,
        "momentum_reset": None,
    }
    config = write_config(tmp_path / "mine.json", stage=3, megalr=section)
    flags = ["--deepspeed", config, *small_run(tmp_path), "--output", "done", "--steps", "5", "--export", "dense"]

    result = run([*plain(), PRETRAIN, *flags], tmp_path)

    assert result.code == 0, result.output
    assert json.loads((tmp_path / "done" / "summary.json").read_text())["export_logit_difference"] < 1e-4
