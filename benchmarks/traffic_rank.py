"""One process of :mod:`benchmarks.traffic`: python -m MODULE FOLDER"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch
from transformers import LlamaConfig

import megalr
from benchmarks.accounting import SentBytes
from benchmarks.ranks import measure_as_rank
from benchmarks.traffic import SETTINGS
from megalr.train.models import build_model

STEPS = 4  # DeepSpeed learns the order of parameters in the first
LENGTH = 16
RANK = 16  # a quarter of the width, as 128 is of 60M's
# The 60M shape's proportions, an eighth as wide and half as deep.
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 1000,
}
PERSISTENT = 100  # numbers up to which a parameter is not cut: norms are whole everywhere, matrices are not


def count_all() -> dict[str, dict[str, Any]]:
    """:func:`count` for each of :data:`SETTINGS`, by title."""
    return {title: count(kind, reduce_scatter) for title, (kind, reduce_scatter) in SETTINGS.items()}


def count(kind: str, reduce_scatter: bool) -> dict[str, Any]:
    """Train :data:`STEPS` steps.

    Returns:
        "steps": bytes that this rank sent in each; "last_step_by_collective".
    """
    model = build_model(LlamaConfig(**SHAPE), seed=0)
    matrices = sum(p.ndim == 2 and ("attn" in name or "mlp" in name) for name, p in model.named_parameters())
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 10**9,
        "zero_optimization": {
            "stage": 3,
            "reduce_scatter": reduce_scatter,
            "stage3_param_persistence_threshold": PERSISTENT,
        },
    }
    with _muon_updates() as updates:
        match kind:
            case "AdamW":
                config["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}
                engine = deepspeed.initialize(model=model, config=config)[0]
            case "DeepSpeed Muon":
                config["optimizer"] = {"type": "Muon", "params": {"lr": 1e-3, "momentum": 0.95, "torch_adam": True}}
                engine = deepspeed.initialize(model=model, config=config, model_parameters=list(model.parameters()))[0]
            case _:
                params = {"lr": 1e-3} if kind == "Muon" else {"lr": 1e-3, "rank": RANK}
                config["optimizer"] = {"type": kind, "params": params}
                engine = megalr.initialize(model=model, config=config)[0]
        steps, by_collective = _train(engine)
        if kind != "AdamW":
            done = len(updates) if kind == "DeepSpeed Muon" else engine.basic_optimizer.rule_calls
            _require_updates(kind, done, STEPS * matrices)
        engine.destroy()
    return {"steps": steps, "last_step_by_collective": by_collective}


def _train(engine: Any) -> tuple[list[float], dict[str, float]]:
    generator = torch.Generator().manual_seed(engine.global_rank)
    steps = []
    for _ in range(STEPS):
        ids = torch.randint(0, SHAPE["vocab_size"], (1, LENGTH), generator=generator)
        with SentBytes() as sent:
            engine.backward(engine(input_ids=ids, labels=ids).loss)
            engine.step()
        steps.append(sent.total)
    return steps, sent.by_kind


@contextmanager
def _muon_updates() -> Iterator[list[None]]:
    """Notes every call of DeepSpeed's rule, which it looks up in this module at every step."""
    from deepspeed.runtime.zero.muon import original_muon

    rule = original_muon.muon_update
    calls: list[None] = []

    def noted(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return rule(*args, **kwargs)

    original_muon.muon_update = noted
    try:
        yield calls
    finally:
        original_muon.muon_update = rule


def _require_updates(kind: str, here: int, expected: int) -> None:
    """Fail unless the rule has updated every matrix at every step, on one rank or another."""
    total = torch.tensor(here)
    torch.distributed.all_reduce(total)
    if total.item() != expected:
        raise RuntimeError(f"{kind} made {total.item()} matrix updates in {STEPS} steps, not {expected}")


if __name__ == "__main__":
    measure_as_rank(Path(sys.argv[1]), count_all)
