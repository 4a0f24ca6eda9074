"""Starting the launchers as a user does, on a model and a text that take seconds."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megalr.checkpoint.manifest import read_manifest
from megalr.checkpoint.reading import read_tensor
from megalr.processes import free_port
from tests import processes
from tests.processes import ROOT, Finished, Running

PRETRAIN = ROOT / "launchers" / "pretrain.py"
EVALUATE = ROOT / "launchers" / "evaluate.py"
CONFIGS = ROOT / "ds_configs"
LIMIT = 240  # seconds; a machine that is busy takes a minute to import everything in three processes

SMALL_MODEL = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 4096,
    "max_position_embeddings": 64,
}
SHORT_TEXT = ["--sequence-length", "32", "--max-train-tokens", "20000", "--max-eval-tokens", "2000"]

# Of a row of metrics.jsonl: times, what follows from them, and memory.
MEASURED = (
    "tokens_per_second",
    "tokens_per_second_per_rank",
    "tflops_per_rank",
    "mfu",
    "seconds",
    "memory_bytes",
    "peak_memory_bytes",
)

# What the user's own launchers would set, and nothing of this test's own process group.
_NOT_INHERITED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_SIZE", "MAKEFLAGS")


def small_run(folder: Path) -> list[str]:
    """Flags for a model and a text that take seconds; ``folder`` is where the model's JSON is written."""
    model = folder / "small.json"
    model.write_text(json.dumps(SMALL_MODEL))
    return ["--model", str(model), *SHORT_TEXT]


def write_config(path: Path, stage: int = 2, **sections: Any) -> Path:
    """A shipped configuration with some sections exchanged; a section that is a dict is merged in."""
    content = json.loads((CONFIGS / f"zero{stage}_lowrank.json").read_text())
    for name, section in sections.items():
        content[name] = {**content.get(name, {}), **section} if isinstance(section, dict) else section
    path.write_text(json.dumps(content))
    return path


def make_pretrain(folder: Path, flags: Sequence[str | Path]) -> list[str]:
    """What `make pretrain` starts, without the installation, where ``folder`` is a clone's."""
    for name in ("launchers", "ds_configs"):
        (folder / name).symlink_to(ROOT / name)
    (folder / ".venv").symlink_to(sys.prefix)
    makefile, installed = str(ROOT / "Makefile"), ".venv/.installed"
    words = ["make", "-f", makefile, "-o", installed, "pretrain"]
    return [*words, f"PORT={free_port()}", f"ARGS={' '.join(map(str, flags))}"]


def plain() -> list[str]:
    """Without a launcher: one process."""
    return [sys.executable]


def deepspeed(count: int) -> list[str]:
    """DeepSpeed's launcher."""
    return [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--num_accelerators",
        str(count),
        "--master_port",
        str(free_port()),
    ]


def torchrun(count: int) -> list[str]:
    """torch's launcher."""
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        str(count),
        "--master_port",
        str(free_port()),
    ]


def run(
    command: Sequence[str | Path], folder: Path, *, warm: bool = True, env: Mapping[str, str] | None = None
) -> Finished:
    """Run a command in ``folder`` to its end.

    Args:
        command: its words.
        folder: where.
        warm: whether its processes are forked from one that has imported everything; a few tests start them anew, as
            users do.
        env: variables to set.
    """
    with started(command, folder, warm=warm, env=env) as process:
        return process.wait()


def started(
    command: Sequence[str | Path], folder: Path, *, warm: bool = True, env: Mapping[str, str] | None = None
) -> contextlib.AbstractContextManager[Running]:
    """A command whose output is one stream, and which is killed at the end with all its children; see :func:`run`."""
    alone: dict[str, str | None] = dict.fromkeys(_NOT_INHERITED)
    env = {**alone, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **(env or {})}
    return processes.started(command, cwd=folder, env=env, limit=LIMIT, one_stream=True, warm=warm)


def metrics(run_folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl."""
    return [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]


def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without what is measured, which no second run has."""
    return [{key: value for key, value in row.items() if key not in MEASURED} for row in rows]


def losses(run_folder: Path) -> list[float]:
    """The training loss of each step."""
    return [row["loss"] for row in metrics(run_folder) if "loss" in row]


def perplexity(output: str) -> float:
    """What launchers/evaluate.py printed."""
    found = re.search(r"held-out perplexity ([\d,.]+) ", output)
    assert found, output
    return float(found.group(1).replace(",", ""))


def assert_same_checkpoints(one: Path, other: Path) -> None:
    """Every tensor and every number in two checkpoints is the same, bit for bit."""
    first, second = read_manifest(one), read_manifest(other)
    assert first.tensors.keys() == second.tensors.keys()
    for key in first.tensors:
        assert torch.equal(read_tensor(first, key), read_tensor(second, key)), key
    for part in ("numbers", "client", "layout"):
        assert first.content[part] == second.content[part]
