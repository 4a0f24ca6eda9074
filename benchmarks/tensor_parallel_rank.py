"""One process of :mod:`benchmarks.tensor_parallel`: python -m MODULE FOLDER JSON"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import LlamaConfig

import megalr
from benchmarks.accounting import SentBytes
from benchmarks.ranks import measure_as_rank
from benchmarks.tensor_parallel import FULL, LOW_RANK, NAIVE
from megalr.layers.low_rank import LowRankConfig, LowRankLinear
from megalr.layers.replacement import parametrize
from megalr.train.models import build_model

LENGTH = 16  # tokens of the counts
LAYERS = (1, 2)  # of the counts: what two have more than one is a layer's


def measure(request: Mapping[str, Any]) -> dict[str, Any]:
    """What was asked for."""
    return count(request["shape"]) if request["what"] == "count" else times(request)


def count(shape: Mapping[str, Any]) -> dict[str, float]:
    """Bytes that this rank sends for a layer and token."""
    found = {}
    for name in (FULL, NAIVE, LOW_RANK):
        sent = []
        for layers in LAYERS:
            engine = engine_of(name, {**shape, "num_hidden_layers": layers})
            ids = torch.zeros(1, LENGTH, dtype=torch.long)
            engine(input_ids=ids)  # DeepSpeed compares the ranks' inputs in the first call
            with SentBytes() as counted:
                engine.backward(engine(input_ids=ids, labels=ids).loss)
            sent.append(counted.total)
            engine.destroy()
        found[name] = (sent[1] - sent[0]) / LENGTH
    return found


def times(request: Mapping[str, Any]) -> dict[str, list[float]]:
    """Seconds of whole training steps, in turns."""
    engines = {name: engine_of(name, request["shape"]) for name in (FULL, LOW_RANK)}
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    generator = torch.Generator().manual_seed(0)
    for _ in range(request["steps"]):
        ids = torch.randint(0, 1000, (1, request["tokens"]), generator=generator)
        for name, engine in engines.items():
            dist.barrier()
            begin = time.perf_counter()
            engine.backward(engine(input_ids=ids, labels=ids).loss)
            engine.step()
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def engine_of(name: str, shape: Mapping[str, Any]) -> Any:
    """A LLaMA under a stage-0 engine whose layers all ranks share."""
    model = build_model(LlamaConfig(**{**shape, "use_cache": False}), seed=0)
    rank = model.config.hidden_size // 4
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 10**9,
        "tensor_parallel": {"autotp_size": dist.get_world_size()},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    }
    if name == LOW_RANK:
        config["megalr"] = {"parametrization": {"type": "low_rank", "rank": rank}}
    if name == NAIVE:
        parametrize(model, LowRankConfig(rank=rank))
        _as_two_layers(model)
        cut = {"column": [r".*\.(attn|self_attn|mlp)\..*\.a\.weight$"], "row": [r".*\.b\.weight$"]}
        specs: list[dict[str, Any]] = [{"patterns": patterns, "partition_type": kind} for kind, patterns in cut.items()]
        specs.append({"patterns": [r"lm_head\.weight$"], "partition_type": "column", "gather_output": True})
        config["tensor_parallel"]["partition_config"] = {"use_default_specs": False, "layer_specs": specs}
    return megalr.initialize(model=model, config=config)[0]


class _TwoLayers(nn.Module):
    """x @ A.T @ B.T as two layers that know nothing of each other, one cut by its output, the other by its input."""

    def __init__(self, layer: LowRankLinear) -> None:
        super().__init__()
        self.a = nn.Linear(layer.in_features, layer.rank, bias=False)
        self.b = nn.Linear(layer.rank, layer.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(self.a(x))
        return y


def _as_two_layers(model: nn.Module) -> None:
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LowRankLinear):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, _TwoLayers(layer))


if __name__ == "__main__":
    measure_as_rank(Path(sys.argv[1]), partial(measure, json.loads(sys.argv[2])))
