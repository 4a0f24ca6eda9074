"""One process of :mod:`benchmarks.checkpoints`: python -m MODULE FOLDER JSON"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import LlamaConfig

import megalr
from benchmarks.checkpoints import AT_ONCE, BESIDE, DEEPSPEED
from benchmarks.ranks import measure_as_rank
from megalr.train.models import build_model

TOKENS = 16  # of a step, which only has to make moments


def measure(request: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds of each save as this rank waits for it, and bytes of one, by kind."""
    model = build_model(LlamaConfig(**{**request["shape"], "use_cache": False}), seed=0)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": request["stage"]},
        **request["config"],
    }
    engine = megalr.initialize(model=model, config=config)[0]
    ids = torch.zeros(1, TOKENS, dtype=torch.long)
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step()
    place = Path(request["folder"])
    kinds: dict[str, Callable[[str], Any]] = {
        DEEPSPEED: lambda tag: engine.save_checkpoint(str(place / DEEPSPEED), tag=tag),
        AT_ONCE: lambda tag: megalr.save_checkpoint(engine, place / AT_ONCE, tag),
        BESIDE: lambda tag: megalr.save_checkpoint(engine, place / BESIDE, tag, asynchronous=True),
    }
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    sizes: dict[str, int] = {}
    for index in range(request["saves"]):
        for kind, save in kinds.items():
            dist.barrier()
            begin = time.perf_counter()
            save(f"save{index}")
            seconds[kind].append(time.perf_counter() - begin)
            megalr.wait_for_checkpoint()
            dist.barrier()
            written = place / kind / f"save{index}"
            sizes[kind] = sum(file.stat().st_size for file in written.rglob("*") if file.is_file())
            dist.barrier()
            if dist.get_rank() == 0:
                shutil.rmtree(written)
    return {"seconds": seconds, "bytes": sizes}


if __name__ == "__main__":
    measure_as_rank(Path(sys.argv[1]), partial(measure, json.loads(sys.argv[2])))
