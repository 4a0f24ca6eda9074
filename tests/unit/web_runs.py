"""Folders of runs for the tests of web pages: with every field that a run can write, or with few."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from megalr.layout.rectangles import Entry, Piece
from tests import known_state

RANK, WIDTH, INNER, BLOCKS, ALPHA = 4, 16, 24, 5, 8.0
SECRET = "sk-do-not-show-0123456789"
SETTINGS: dict[str, Any] = {
    "command": f"launchers/pretrain.py --deepspeed ds.json --api-key={SECRET} --steps 200",
    "started": "2026-01-02 03:04:05",
    "arguments": {"deepspeed": "ds.json", "steps": 400, "resume": False, "export": None},
    "processes": 2,
    "device": "cpu",
    "deepspeed": {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 2},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.003}},
        "megalr": {"parametrization": {"type": "low_rank", "rank": RANK, "alpha": ALPHA}},
        "wandb": {"enabled": True, "api_key": SECRET, "password": "q7!"},
    },
    "model": {"architectures": ["LlamaForCausalLM"], "hidden_size": WIDTH},
    "data": {"dataset": "https://someone:hunter22@example.org/text.txt"},
    "python": "3.11",
    "versions": {"torch": "2.0"},
}
SUMMARY = {
    "perplexity": 88.43,
    "perplexity_unigram": 663.03,
    "steps": 200,
    "tokens": 20_000,
    "epochs": 1.5,
    "tokens_per_second": 1234.5,
    "parameters": 1_365_120,
    "trained_parameters": 1_000_000,
    "bytes_per_rank": {"weights": 4e6, "gradients": 2e6, "masters": 2e6, "optimizer_state": 4e6},
    "peak_memory_bytes": 757_000_000,
}


def update(step: int, **changes: Any) -> dict[str, Any]:
    """A row of an update, as every megalr writes it."""
    row = {
        "step": step,
        "tokens": 100 * step,
        "epoch": step / 100,
        "loss": 4 + 4 * math.exp(-step / 40) + 0.05 * math.sin(step),
        "lr": 0.003,
        "tokens_per_second": 1000.0 + step,
        "grad_norm": 0.5 + 0.1 * math.cos(step),
        "exchange_bytes": 0,
    }
    return {**row, **changes}


def measured(step: int) -> dict[str, Any]:
    """Further fields, which older runs lack."""
    return {
        "tokens_per_second_per_rank": 500.0 + step,
        "tflops_per_rank": 1.5,
        "mfu": None if step < 50 else 0.31,
        "learning_rates": {"factors": 0.003, "trunk": 0.003, "embeddings": 0.01 / step},
        "seconds": {"forward": 0.1, "backward": 0.2, "optimizer": 0.05, "exchange": 0.002, "total": 0.36},
        "memory_bytes": 700_000_000 + 1000 * step,
        "peak_memory_bytes": 757_000_000,
    }


def evaluation(step: int, loss: float) -> dict[str, Any]:
    """A row of an evaluation."""
    exp = math.exp(loss) if loss < 700 else math.inf
    return {"step": step, "tokens": 100 * step, "epoch": step / 100, "eval_loss": loss, "eval_perplexity": exp}


def sample(step: int, loss: float) -> dict[str, Any]:
    """A row of an evaluation that read a sample of the text."""
    return {**evaluation(step, loss), "eval_tokens": 1000, "eval_is_sample": True}


def history(updates: int = 200, *, new: bool = True) -> list[dict[str, Any]]:
    """Rows of a run with events, a skipped update, and evaluations."""
    rows = [evaluation(0, 8.3)]
    for step in range(1, updates + 1):
        changes = measured(step) if new else {}
        if step % 50 == 0:
            changes["events"] = ["refactorization", "momentum_reset"]
        if step == 77:
            changes |= {"events": ["skipped"], "skipped": "the loss is nan", "loss": None}
        rows.append(update(step, **changes))
        if step % 50 == 0:
            rows.append(evaluation(step, 4.5 + 100 / step))
    return rows


def write_rows(folder: Path, rows: list[dict[str, Any]], end: str = "") -> None:
    """Write ``metrics.jsonl``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + end)


def tensors() -> dict[str, torch.Tensor]:
    """Weights of low-rank layers in blocks, of a dense layer in each, and of an embedding."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    found = {"model.embed_tokens.weight": random(32, WIDTH), "model.norm.weight": random(WIDTH)}
    for block in range(BLOCKS):
        name = f"model.layers.{block}"
        found[f"{name}.self_attn.q_proj.B"], found[f"{name}.self_attn.q_proj.A"] = (
            random(WIDTH, RANK),
            random(RANK, WIDTH),
        )
        found[f"{name}.mlp.up_proj.B"], found[f"{name}.mlp.up_proj.A"] = random(INNER, RANK), random(RANK, WIDTH)
        found[f"{name}.mlp.router.weight"] = random(INNER, WIDTH)
    return found


def write_checkpoint(folder: Path, weights: dict[str, torch.Tensor], section: dict[str, Any] | None) -> Path:
    """Write a checkpoint of fp32 masters, as a run writes it."""
    entries = {}
    for name, value in weights.items():
        entries[f"weights/{name}"] = Entry(tuple(value.shape), value.dtype, (Piece((0,) * value.dim(), value),))
    document = {**known_state.document(200), "config": {"megalr": {"parametrization": section}}}
    known_state.write_entries(folder / "checkpoints", "step200", document, entries, {}, keep=None, asynchronous=False)
    return folder / "checkpoints" / "step200"


def write_run(folder: Path, *, finished: bool = True, new: bool = True) -> Path:
    """Write a whole run."""
    write_rows(folder, history(new=new))
    (folder / "run.json").write_text(json.dumps(SETTINGS))
    if finished:
        (folder / "summary.json").write_text(json.dumps(SUMMARY))
    write_checkpoint(folder, tensors(), SETTINGS["deepspeed"]["megalr"]["parametrization"])
    return folder
