"""Types and limits of DeepSpeed's own values: those that it takes as they are and that go wrong later, or in silence.

DeepSpeed checks the names in most of its sections itself. It converts values, so that 1 is true and true is 1, and
nothing is known of its schedules' numbers before one of them is multiplied.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megalr.errors import UserError
from megalr.schema import Json, slip


@dataclass(frozen=True)
class Kind:
    """What a value may be.

    Attributes:
        words: what to write, for a message.
        holds: whether a value is one; it is not null, "auto", or an infinite number.
        null: whether null may stand there, for DeepSpeed's default.
    """

    words: str
    holds: Callable[[Any], bool]
    null: bool = False


def _number(least: float, most: float = math.inf, *, null: bool = False) -> Kind:
    words = f"a number of at least {least}" if most == math.inf else f"a number from {least} to {most}"
    return Kind(words, lambda value: _is_number(value) and least <= value <= most, null)


def _whole(least: int, most: float = math.inf, *, null: bool = False) -> Kind:
    words = f"a whole number of at least {least}" if most == math.inf else f"a whole number from {least} to {most}"
    return Kind(words, lambda value: _is_number(value) and isinstance(value, int) and least <= value <= most, null)


def _size(least: int) -> Kind:
    """A count that people write as 5e8."""
    words = f"a whole number of at least {least}"
    return Kind(words, lambda value: _is_number(value) and value == int(value) and least <= value)


def _one_of(*words: str, null: bool = False) -> Kind:
    return Kind(f"one of {', '.join(words)}", lambda value: isinstance(value, str) and value.lower() in words, null)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


FLAG = Kind("true or false", lambda value: isinstance(value, bool))
TEXT = Kind("a string", lambda value: isinstance(value, str))
OBJECT = Kind("an object like {...}", lambda value: isinstance(value, Mapping), null=True)
RATE = _number(0)  # one for each group is none that a user could count
DTYPE = _one_of("fp32", "fp16", "bf16", "float32", "float16", "bfloat16", null=True)

# By place in the JSON.
VALUES: dict[str, Kind] = {
    "communication_data_type": _one_of("fp32", "fp16", "bf16", null=True),
    "data_types.grad_accum_dtype": DTYPE,
    "fp16.hysteresis": _whole(1),
    "fp16.initial_scale_power": _whole(0, 60),
    "fp16.loss_scale": _number(0),
    "fp16.loss_scale_window": _whole(1),
    "fp16.min_loss_scale": _number(0),
    "gradient_accumulation_steps": _whole(1, null=True),
    "gradient_clipping": _number(0, null=True),
    "optimizer.params": OBJECT,
    "scheduler.params": OBJECT,
    "steps_per_print": _whole(1, null=True),
    "torch_autocast.dtype": Kind(DTYPE.words, DTYPE.holds),
    "train_batch_size": _whole(1, null=True),
    "train_micro_batch_size_per_gpu": _whole(1, null=True),
    "zero_optimization.stage": _whole(0, 3),
    "zero_optimization.zero_hpz_partition_size": _whole(1),
    **dict.fromkeys(("gradient_predivide_factor",), Kind("a number above 0", lambda v: _is_number(v) and v > 0)),
}
_OBJECTS = (
    "activation_checkpointing",
    "bf16",
    "checkpoint",
    "comet",
    "csv_monitor",
    "data_types",
    "flops_profiler",
    "fp16",
    "megalr",
    "scheduler",
    "tensor_parallel",
    "tensorboard",
    "torch_autocast",
    "wandb",
    "zero_optimization",
)
_FLAGS = {
    "": (
        "dataloader_drop_last",
        "disable_allgather",
        "dump_state",
        "memory_breakdown",
        "prescale_gradients",
        "sparse_gradients",
        "wall_clock_breakdown",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
    ),
    "activation_checkpointing.": (
        "contiguous_memory_optimization",
        "cpu_checkpointing",
        "partition_activations",
        "profile",
        "synchronize_checkpoint_boundary",
    ),
    "bf16.": (
        "bf16_master_weights_and_grads",
        "bf16_optimizer_states",
        "check_grad_overflow",
        "enabled",
        "immediate_grad_update",
    ),
    "comet.": ("enabled", "online"),
    "csv_monitor.": ("enabled",),
    "fp16.": ("auto_cast", "consecutive_hysteresis", "enabled", "fp16_master_weights_and_grads"),
    "scheduler.params.": ("cycle_momentum", "lr_range_test_staircase"),
    "tensorboard.": ("enabled",),
    "torch_autocast.": ("enabled",),
    "wandb.": ("enabled",),
    "zero_optimization.": (
        "allgather_partitions",
        "contiguous_gradients",
        "elastic_checkpoint",
        "ignore_unused_parameters",
        "load_from_fp32_weights",
        "memory_efficient_linear",
        "override_module_apply",
        "pipeline_loading_checkpoint",
        "reduce_scatter",
        "round_robin_gradients",
        "stage3_gather_16bit_weights_on_model_save",
        "use_multi_rank_bucket_allreduce",
        "zero_quantized_gradients",
        "zero_quantized_nontrainable_weights",
        "zero_quantized_weights",
    ),
    "zero_optimization.offload_optimizer.": ("fast_init", "pin_memory", "pipeline_read", "pipeline_write"),
    "zero_optimization.offload_param.": ("pin_memory",),
}
VALUES |= dict.fromkeys(_OBJECTS, OBJECT)
VALUES |= {f"{section}{key}": FLAG for section, keys in _FLAGS.items() for key in keys}
VALUES["zero_optimization.overlap_comm"] = Kind(FLAG.words, FLAG.holds, null=True)
VALUES |= dict.fromkeys(("zero_optimization.offload_optimizer", "zero_optimization.offload_param"), OBJECT)
VALUES |= {
    f"{section}.{key}": TEXT for section in ("tensorboard", "csv_monitor") for key in ("job_name", "output_path")
}
VALUES |= {f"zero_optimization.{key}": _size(1) for key in ("reduce_bucket_size", "sub_group_size")}
VALUES |= {
    f"zero_optimization.{key}": _size(0)
    for key in (
        "allgather_bucket_size",
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
        "stage3_param_persistence_threshold",
        "stage3_prefetch_bucket_size",
    )
}
# Of a schedule, DeepSpeed's or torch's.
VALUES |= {
    f"scheduler.params.{key}": kind
    for key, kind in {
        "T_max": _whole(1),
        "cos_min_ratio": _number(0, 1),
        "cycle_first_step_size": _whole(1),
        "cycle_max_lr": RATE,
        "cycle_min_lr": RATE,
        "decay_lr_rate": _number(0),
        "decay_step_size": _whole(0),
        "eta_min": _number(0),
        "gamma": _number(0),
        "lr_range_test_min_lr": RATE,
        "lr_range_test_step_rate": _number(0),
        "lr_range_test_step_size": _whole(1),
        "step_size": _whole(1),
        "total_num_steps": _whole(1),
        "warmup_max_lr": _number(0, null=True),
        "warmup_min_lr": RATE,
        "warmup_min_ratio": _number(0, 1),
        "warmup_num_steps": _whole(1),
        "warmup_type": _one_of("log", "linear"),
    }.items()
}

SCHEDULE = [place.rpartition(".")[2] for place in VALUES if place.startswith("scheduler.params.")]


def check(content: Json) -> None:
    """Refuse what DeepSpeed would take for something else.

    Args:
        content: the whole configuration; "auto" is left to whoever resolves it.

    Raises:
        UserError: names the key, what it is, and what to write.
    """
    for place, kind in VALUES.items():
        *sections, key = place.split(".")
        section: Any = content
        for name in sections:
            section = section.get(name) if isinstance(section, Mapping) else None
        if not isinstance(section, Mapping) or key not in section:
            continue
        value = section[key]
        if not (value == "auto" or (value is None and kind.null) or (value is not None and kind.holds(value))):
            name = f'"{place}" must be' if kind is OBJECT else f"{place} is {short(value)}: write"
            raise UserError(f"{name} {kind.words}" + (f", not {short(value)}" if kind is OBJECT else ""))
    _refuse_slips((content.get("scheduler") or {}).get("params") or {}, SCHEDULE, "scheduler.params")


def _refuse_slips(section: Json, known: Sequence[str], where: str) -> None:
    for key in section:
        meant = None if key in known else slip(str(key), known)
        if meant is not None:
            raise UserError(f'{where} has no key "{key}"; did you mean "{meant}"?')


def short(value: Any) -> str:
    """A value as JSON has it, cut to some length."""
    written = json.dumps(value, default=str)
    return written if len(written) <= 60 else f"{written[:57]}..."
