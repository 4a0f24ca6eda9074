"""What DeepSpeed would refuse in its JSON, said before anything is built and without its traceback."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch

from megalr.api import deepspeed_section, refuse_unsupported
from megalr.errors import UserError, in_short


def check_deepspeed_config(config: Mapping[str, Any], data_size: int) -> None:
    """Let DeepSpeed read the configuration, and look at the scheduler, which it reads too late.

    Args:
        config: the JSON, without "auto".
        data_size: number of processes that have data of their own.

    Raises:
        UserError: DeepSpeed's own words, shortened.
    """
    from deepspeed.runtime.config import DeepSpeedConfig

    refuse_unsupported(config)
    try:
        DeepSpeedConfig(deepspeed_section(config), mpu=SimpleNamespace(get_data_parallel_world_size=lambda: data_size))
    except Exception as error:  # pydantic's, assertions and ValueErrors
        raise UserError(f"DeepSpeed refuses the configuration: {in_short(error)}") from error
    if config.get("scheduler"):
        _check_scheduler(config["scheduler"])


def _check_scheduler(section: Mapping[str, Any]) -> None:
    from deepspeed.runtime import lr_schedules

    name = str(section.get("type"))
    known = lr_schedules.VALID_LR_SCHEDULES
    kind = getattr(lr_schedules if name in known else torch.optim.lr_scheduler, name, None)
    if kind is None:
        raise UserError(f"scheduler.type is {name!r}; DeepSpeed has {', '.join(known)}")
    valid = [key for key in inspect.signature(kind).parameters if key != "optimizer"]
    for key in section.get("params") or {}:
        if key not in valid:
            raise UserError(f'scheduler.params has no "{key}" for {name}; valid: {", ".join(valid)}')
