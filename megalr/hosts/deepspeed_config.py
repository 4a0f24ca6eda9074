"""What DeepSpeed gets to see of the JSON, and what it would refuse there, said before anything is built."""

from __future__ import annotations

import inspect
import json
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from megalr.errors import UserError, in_short
from megalr.hosts.autotp import check_section
from megalr.hosts.features import refuse_features
from megalr.naming import has_compiled
from megalr.schema import Json

CONFIG = "deepspeed.runtime.config"
BATCH = ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps")
SCHEDULES = "deepspeed.runtime.lr_schedules"
# A warning of DeepSpeed's for every schedule that is made, which says nothing of one that is started at once.
NOT_STARTED = "Attempting to get learning rate from scheduler before it has started"

# Schedules that set the rate of all groups, and where it is: what they warm up to, the peak of a cycle, where a range
# test starts. The first takes each group's own rate where there is no such key.
COMMON_RATES = {
    "WarmupLR": "warmup_max_lr",
    "WarmupDecayLR": "warmup_max_lr",
    "OneCycle": "cycle_max_lr",
    "LRRangeTest": "lr_range_test_min_lr",
    "OneCycleLR": "max_lr",
    "CyclicLR": "max_lr",
}

# What this file reads of DeepSpeed; held by tests/deepspeed/test_contract.py.
INTERNALS = {CONFIG: ("DeepSpeedConfig", "DtypeEnum"), SCHEDULES: ("VALID_LR_SCHEDULES",)}


def deepspeed_section(content: Json) -> dict[str, Any]:
    """What DeepSpeed is to see of the JSON: all but our two sections, and its consent to a client optimizer."""
    rest = {key: value for key, value in content.items() if key not in ("megalr", "optimizer")}
    rest.setdefault("zero_allow_untested_optimizer", True)
    rest.setdefault("zero_force_ds_cpu_optimizer", False)
    return rest


def refuse_unsupported(content: Json) -> None:
    """Raise a UserError for what DeepSpeed can do but megalr, or this machine, cannot."""
    if content.get("tensor_parallel"):
        check_section(content)
    refuse_features(content)
    if content.get("scheduler"):
        _refuse_cycled_betas(content["scheduler"])
        _refuse_torch_schedule(content)
    if content.get("zero_allow_untested_optimizer") is False:
        raise UserError(
            "zero_allow_untested_optimizer is false, and DeepSpeed has tested no optimizer of megalr's: write true, or "
            "leave it out"
        )
    if (content.get("fp16") or {}).get("enabled") not in (None, False, "auto") and not torch.cuda.is_available():
        raise UserError('fp16 needs a GPU: write "fp16": {"enabled": false} and "bf16": {"enabled": "auto"}')


def common_rate(content: Json) -> tuple[str, float, bool] | None:
    """The learning rate that the JSON's schedule gives to all groups of parameters, whatever their own are.

    Returns:
        Its key in "scheduler.params", its value, and whether that is the schedule's default; None if the schedule
        multiplies each group's own rate, or has a number for each group.
    """
    section = content.get("scheduler") or {}
    name, params = section.get("type"), section.get("params") or {}
    if not isinstance(name, str) or name not in COMMON_RATES:
        return None
    from deepspeed.runtime import lr_schedules  # noqa: PLC0415

    key = COMMON_RATES[name]
    kind = getattr(lr_schedules, name, None) or getattr(torch.optim.lr_scheduler, name)
    value = params.get(key, inspect.signature(kind).parameters[key].default)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return (key, float(value), key not in params) if is_number else None


@contextmanager
def without_warnings(*parts: str) -> Iterator[None]:
    """Keep messages that contain one of these parts out of DeepSpeed's log."""

    def shown(record: logging.LogRecord) -> bool:
        return not any(part in record.getMessage() for part in parts)

    log = logging.getLogger("DeepSpeed")
    log.addFilter(shown)
    try:
        yield
    finally:
        log.removeFilter(shown)


def _refuse_cycled_betas(section: Any) -> None:
    """Raise a UserError for a schedule that is to cycle betas, which DeepSpeed would not do."""
    params = section.get("params") if isinstance(section, Mapping) else None
    if isinstance(params, Mapping) and params.get("cycle_momentum") is True:
        raise UserError(
            f"scheduler.params.cycle_momentum is true for {section.get('type')}, and megalr's optimizer keeps its "
            'betas during a run: write "cycle_momentum": false; the learning rate is cycled as before'
        )


def _refuse_torch_schedule(content: Json) -> None:
    """Raise a UserError for a schedule of torch's where DeepSpeed wraps the optimizer: torch refuses the wrapper."""
    from deepspeed.runtime.lr_schedules import VALID_LR_SCHEDULES  # noqa: PLC0415

    name = (content.get("scheduler") or {}).get("type")
    wrapped = (content.get("zero_optimization") or {}).get("stage", 0) or any(
        (content.get(section) or {}).get("enabled") is True for section in ("bf16", "fp16")
    )
    if isinstance(name, str) and name not in VALID_LR_SCHEDULES and hasattr(torch.optim.lr_scheduler, name) and wrapped:
        raise UserError(
            f"scheduler.type is {name}, one of torch's, which DeepSpeed can make neither with ZeRO nor in 16 bits: "
            f"write one of {', '.join(VALID_LR_SCHEDULES)}, or give megalr.initialize an lr_scheduler= of your own"
        )


def refuse_compiled(model: nn.Module, content: Json) -> None:
    """Raise a UserError for a model that torch.compile has wrapped, whole or in parts, where stage 3 cannot run it."""
    stage = (content.get("zero_optimization") or {}).get("stage", 0)
    if stage == 3 and has_compiled(model):
        raise UserError(
            "at ZeRO stage 3 DeepSpeed cannot run modules that torch.compile has wrapped: give the model itself, and "
            "call engine.compile() afterwards"
        )


def check_deepspeed_config(config: Mapping[str, Any], data_size: int | None) -> None:
    """Let DeepSpeed read the configuration, and look at the scheduler, which it reads too late.

    Args:
        config: the JSON, without "auto".
        data_size: number of processes that have data of their own; None: the sizes of batches have to fit some number.

    Raises:
        UserError: DeepSpeed's own words, shortened.
    """
    from deepspeed.runtime.config import DeepSpeedConfig

    refuse_unsupported(config)
    section = deepspeed_section(config)
    _check_accumulation(config)
    _check_batch(config, data_size)
    if data_size is None:
        section = {key: value for key, value in section.items() if key not in BATCH} | {BATCH[0]: 1}
    try:
        DeepSpeedConfig(section, mpu=SimpleNamespace(get_data_parallel_world_size=lambda: data_size or 1))
    except Exception as error:  # pydantic's, assertions and ValueErrors
        raise UserError(f"DeepSpeed refuses the configuration: {in_short(error)}") from error
    if config.get("scheduler"):
        _check_scheduler(config["scheduler"])


def _check_batch(config: Mapping[str, Any], data_size: int | None) -> None:
    """Refuse sizes of batches that the processes cannot share, or, for None, no number of them."""
    sizes = {key: config[key] for key in BATCH if config.get(key) is not None}
    for key, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{key} is {json.dumps(value, default=str)}: write a whole number of at least 1")
    if not sizes.keys() & set(BATCH[:2]):
        raise UserError(f"the JSON has neither {BATCH[1]} nor {BATCH[0]}: write one of them")
    total = sizes.pop(BATCH[1], None)
    if total is None:
        return
    share = math.prod(sizes.values()) * (data_size or 1)
    exact = data_size is not None and len(sizes) == 2
    if total % share or (exact and total != share):
        parts = [f"{key} of {value}" for key, value in sizes.items()]
        parts += [f"{data_size} process{'es' if data_size > 1 else ''}"] if data_size is not None else []
        raise UserError(
            f"{BATCH[1]} is {total}, which is not {'' if exact else 'a multiple of '}{' x '.join(parts)}: write "
            f"{share if exact else -(-total // share) * share}, or leave it out"
        )


def _check_accumulation(config: Mapping[str, Any]) -> None:
    """Refuse a type for gradients that DeepSpeed does not know, or not beside the weights' at stage 0."""
    from deepspeed.runtime.config import DtypeEnum  # noqa: PLC0415

    where, given = "data_types.grad_accum_dtype", (config.get("data_types") or {}).get("grad_accum_dtype")
    if given is None:
        return
    known = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    try:
        dtype = DtypeEnum(given).value
    except ValueError:
        dtype = None
    if dtype not in known.values():
        raise UserError(f"{where} is {json.dumps(given, default=str)}: write one of {', '.join(known)}")
    weights = next((name for name in ("fp16", "bf16") if (config.get(name) or {}).get("enabled") is True), "fp32")
    if not (config.get("zero_optimization") or {}).get("stage", 0) and dtype != known[weights]:
        raise UserError(
            f"{where} is {json.dumps(given)}, and without ZeRO DeepSpeed adds gradients up in the weights' type alone: "
            f'write "{weights}", leave it out, or write "zero_optimization": {{"stage": 1}}'
        )


def _check_scheduler(section: Mapping[str, Any]) -> None:
    from deepspeed.runtime import lr_schedules

    known = lr_schedules.VALID_LR_SCHEDULES
    if "type" not in section:
        raise UserError(f'scheduler needs a "type"; DeepSpeed has {", ".join(known)}')
    name = str(section["type"])
    kind = getattr(lr_schedules if name in known else torch.optim.lr_scheduler, name, None)
    if kind is None:
        raise UserError(f"scheduler.type is {name!r}; DeepSpeed has {', '.join(known)}")
    valid = [key for key in inspect.signature(kind).parameters if key not in ("self", "optimizer")]
    params = {} if section.get("params") is None else section["params"]
    if not isinstance(params, Mapping):
        raise UserError(f"scheduler.params must be an object like {{...}}, not {params!r}")
    for key in params:
        if key not in valid:
            raise UserError(f'scheduler.params has no "{key}" for {name}; valid: {", ".join(valid)}')
    needed = [k for k, p in inspect.signature(kind).parameters.items() if p.default is p.empty and k in valid]
    for key in needed:
        if key not in params:
            raise UserError(f'scheduler.params needs "{key}" for {name}')
    if any(isinstance(value, list) for value in params.values()):
        return  # of a value for each group of parameters, which are not known yet
    try:
        with without_warnings(NOT_STARTED):
            kind(torch.optim.Adam([torch.zeros(1)], lr=1.0), **params)
    except Exception as error:  # whatever it thinks of the values
        raise UserError(f"scheduler.params cannot be those of {name}: {error}") from error
