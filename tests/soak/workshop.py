"""What bad inputs are made from: a small model, a text, a run that has ended, its checkpoints and its export."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from tests import known_state
from tests.end_to_end.commands import CONFIGS, PRETRAIN, SMALL_MODEL
from tests.processes import ROOT, run
from tests.soak.trial import ALONE

EVALUATE = str(ROOT / "launchers" / "evaluate.py")
PLAN = str(ROOT / "launchers" / "plan.py")
COMPARE = str(ROOT / "launchers" / "compare.py")
BENCHMARK = str(ROOT / "launchers" / "benchmark.py")
TEXT = "".join(f"It is the {i}th truth, universally acknowledged, that {i * i} is a square.\n" for i in range(400))
SIZES = ("--model", "small.json", "--dataset", "text.txt", "--sequence-length", "32")
# A run of one update; what a case appends or changes makes it bad.
TRAIN = (str(PRETRAIN), *SIZES, "--steps", "1", "--output", "new")
TWO_UPDATES = ("--steps", "2", "--save-every", "1", "--output", "run", "--export", "export")


def good_config() -> dict[str, Any]:
    """A configuration that trains."""
    content: dict[str, Any] = json.loads((CONFIGS / "zero2_lowrank.json").read_text())
    return {**content, "tensorboard": {"enabled": False}, "train_batch_size": 4}


def prepare(folder: Path, needs: Collection[str]) -> None:
    """Make good.json, small.json and text.txt, and of what else a case may need what is named.

    Args:
        folder: where.
        needs: "run" and "export", a run that has ended and its model; "checkpoints" of something else.
    """
    (folder / "small.json").write_text(json.dumps(SMALL_MODEL))
    (folder / "text.txt").write_text(TEXT)
    (folder / "good.json").write_text(json.dumps(good_config()))
    if "checkpoints" in needs:
        for updates in (1, 2):
            known_state.write(folder / "checkpoints", updates)
    if "run" in needs or "export" in needs:
        words = [sys.executable, str(PRETRAIN), "--deepspeed", "good.json", *SIZES, *TWO_UPDATES]
        run(words, cwd=folder, env={**ALONE, "MEGALR_CACHE": str(folder / "cache")}, warm=True)
