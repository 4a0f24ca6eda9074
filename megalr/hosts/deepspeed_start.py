"""Starting DeepSpeed: its processes, and an engine around a model and an optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from os import environ
from typing import Any

import torch.distributed as dist
from torch import nn

from megalr.hosts.deepspeed import POSITION
from megalr.hosts.deepspeed_config import deepspeed_section
from megalr.hosts.deepspeed_watch import watch
from megalr.schema import Json

# What this file reads and writes of DeepSpeed; held by tests/deepspeed/test_contract.py.
INTERNALS = {
    "deepspeed": ("initialize",),
    "deepspeed.comm": ("init_distributed",),
    "deepspeed.ops": ("__compatible_ops__",),
    "deepspeed.runtime.engine.DeepSpeedEngine": ("_common_checkpoint_state", "zero_optimization_stage"),
}


def join_processes(timeout: timedelta | None) -> None:
    """Join the process group that the environment describes, through DeepSpeed.

    Args:
        timeout: of collectives; None for DeepSpeed's own, or its DEEPSPEED_TIMEOUT.

    Raises:
        torch.distributed.DistNetworkError: the processes cannot reach each other.
    """
    import deepspeed.comm  # noqa: PLC0415  (slow to import)
    import deepspeed.ops  # noqa: PLC0415

    # At its first start on a CPU DeepSpeed would compile an op for tensor-parallel inference, which takes over
    # a minute and serves nothing here.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.comm.init_distributed(verbose=False, **({} if timeout is None else {"timeout": timeout}))


def join_before_engine(kwargs: Mapping[str, Any]) -> None:
    """Join the processes of a launcher where ``deepspeed.initialize`` would, and nobody has said how.

    Args:
        kwargs: of ``deepspeed.initialize``.
    """
    ways = ("dist_init_required", "distributed_port")
    alone = int(environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in environ
    if not (alone or dist.is_initialized() or any(kwargs.get(way) is not None for way in ways)):
        join_processes(None)


def start_engine(model: nn.Module, optimizer: Any, content: Json, **kwargs: Any) -> tuple[Any, Any, Any, Any]:
    """``deepspeed.initialize``, without what it would get wrong for us.

    A schedule of DeepSpeed's is put at its first iteration; left alone it would spend the first update on a learning
    rate of zero.

    Args:
        model, optimizer: as DeepSpeed takes them.
        content: the JSON, with our sections.
        **kwargs: passed on.

    Returns:
        ``(engine, optimizer, dataloader, scheduler)``.
    """
    import deepspeed  # noqa: PLC0415  (slow to import, and `import megalr` is cheap)

    watch(optimizer)
    results = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_section(content), **kwargs)
    engine, wrapped, loader, schedule = results
    if getattr(schedule, POSITION, None) == -1:
        schedule.step()
    _keep_frozen(engine)
    return engine, wrapped, loader, schedule


def _keep_frozen(engine: Any) -> None:
    """Have ``engine.save_checkpoint`` write what DeepSpeed's zero_to_fp32.py reads of frozen weights at stage 1, too.

    DeepSpeed writes it at stages 2 and 3 alone, and its script then leaves W0 and bases out without a word.
    """
    original = getattr(engine, "_common_checkpoint_state", None)
    frozen = {name for name, parameter in engine.module.named_parameters() if not parameter.requires_grad}
    if original is None or engine.zero_optimization_stage() != 1 or not frozen:
        return

    def with_frozen(module: dict[str, Any] | None, zero_state: bool, save_frozen: bool) -> dict[str, Any]:
        # A pipeline's stages write files of their own; what the user leaves out is not there.
        state: dict[str, Any] = original(module, zero_state, save_frozen or frozen <= (module or {}).keys())
        return state

    engine._common_checkpoint_state = with_frozen
