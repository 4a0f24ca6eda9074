"""Starting DeepSpeed: its processes, and an engine around a model and an optimizer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from os import environ
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from megalr.errors import UserError
from megalr.hosts.deepspeed import POSITION
from megalr.hosts.deepspeed_config import NOT_STARTED, deepspeed_section, without_warnings
from megalr.hosts.deepspeed_watch import watch
from megalr.schema import Json, nearest

# What this file reads and writes of DeepSpeed; held by tests/deepspeed/test_contract.py.
INTERNALS = {
    "deepspeed": ("initialize",),
    "deepspeed.comm": ("init_distributed",),
    "deepspeed.ops": ("__compatible_ops__",),
    "deepspeed.runtime.engine.DeepSpeedEngine": ("_common_checkpoint_state", "zero_optimization_stage"),
}

# A warning of DeepSpeed's for every optimizer but its own.
UNTESTED = "ZeRO with an untested optimizer"

# Arguments of deepspeed.initialize, what may be given, and how to say it. A schedule that is made belongs to another
# optimizer than the one that megalr.initialize makes.
ARGUMENTS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "training_data": (
        lambda value: (
            hasattr(value, "__getitem__" if hasattr(value, "__len__") else "__iter__")
            and not isinstance(value, str | bytes)
        ),
        "a torch.utils.data.Dataset",
    ),
    "lr_scheduler": (
        lambda value: callable(value) or (hasattr(value, "step") and getattr(value, "optimizer", None) is None),
        "a function that makes a schedule of the optimizer, such as lambda optimizer: "
        "torch.optim.lr_scheduler.StepLR(optimizer, 100)",
    ),
    "collate_fn": (callable, "a function that makes a batch of a list of samples"),
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


def check_arguments(model: nn.Module, kwargs: dict[str, Any]) -> None:
    """Refuse what ``deepspeed.initialize`` would refuse, or overlook, when the model has been changed.

    Args:
        model: what the user gave as one.
        kwargs: for it, beside the model and the JSON; none of them is None. ``model_parameters`` is removed if it is
            what megalr trains anyway.

    Raises:
        UserError: names the argument and says what to give.
    """
    import deepspeed  # noqa: PLC0415  (slow to import)

    if "optimizer" in kwargs:
        raise UserError(
            "megalr.initialize builds the optimizer itself and takes no optimizer=; to pass your own, use "
            "megalr.parametrize, megalr.build_optimizer and deepspeed.initialize"
        )
    if "model_parameters" in kwargs:
        _check_parameters(model, kwargs.pop("model_parameters"))
    known = dict.fromkeys(inspect.signature(deepspeed.initialize).parameters)
    for key in ("model", "config", "optimizer", "model_parameters", "config_params"):
        del known[key]
    for key in kwargs:
        if key == "config_params":
            raise UserError("config_params is another name of config: give megalr.initialize config alone")
        if key not in known:
            raise UserError(f'megalr.initialize has no argument "{key}"{nearest(key, known)}')
    for key, (holds, words) in ARGUMENTS.items():
        if key in kwargs and not holds(kwargs[key]):
            raise UserError(f"{key} is {kwargs[key]!r:.60}: give {words}")


def _check_parameters(model: Any, given: Any) -> None:
    """Refuse other parameters than the model's own, all of them or all that are trained: these megalr finds itself."""
    own = list(model.parameters()) if isinstance(model, nn.Module) else []
    given = list(given) if isinstance(given, Iterable) and not isinstance(given, Tensor | Mapping) else [given]
    wholes = [{id(p) for p in own}, {id(p) for p in own if p.requires_grad}]
    if not given or {id(p) for p in given} not in wholes:
        raise UserError(
            "megalr.initialize trains all parameters with requires_grad, and takes no model_parameters= but "
            "model.parameters(): set requires_grad to False for what is not to be trained, and write settings of "
            'groups into "optimizer" of the JSON'
        )


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

    A schedule of DeepSpeed's is put at its first iteration; left alone it would spend the first update on the rate
    before it, zero or the lowest. DeepSpeed's warnings of an untested optimizer and of a schedule that has not started
    are not shown.

    Args:
        model, optimizer: as DeepSpeed takes them.
        content: the JSON, with our sections.
        **kwargs: passed on.

    Returns:
        ``(engine, optimizer, dataloader, scheduler)``.
    """
    import deepspeed  # noqa: PLC0415  (slow to import, and `import megalr` is cheap)

    watch(optimizer)
    with without_warnings(UNTESTED, NOT_STARTED):
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
