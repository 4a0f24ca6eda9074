"""DeepSpeed: how ZeRO keeps parameters, and one engine that runs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from megalr.errors import UserError
from megalr.hosts import tensor_parallel, zero_layouts
from megalr.hosts.base import EngineTensors, Groups, Host, NamedGroup, RunningHost
from megalr.hosts.deepspeed_config import check_deepspeed_config
from megalr.layout.shard import Shard

ENGINE = "deepspeed.runtime.engine.DeepSpeedEngine"
STAGES_1_AND_2 = "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer"
STAGE_3 = zero_layouts.STAGE_3
BF16 = "deepspeed.runtime.bf16_optimizer.BF16_Optimizer"
ACCUMULATING = "a parameter of DeepSpeedZeroOptimizer"
UNFUSED = "deepspeed.runtime.fp16.unfused_optimizer.FP16_UnfusedOptimizer"

# Where the wrappers of the base optimizer keep things, by class: the model's parameters by group, the masters, the
# gradients.
MODEL_GROUPS = {STAGES_1_AND_2: "bit16_groups", BF16: "bf16_groups", STAGE_3: "fp16_groups", UNFUSED: "fp16_groups"}
MASTERS = {
    STAGES_1_AND_2: "single_partition_of_fp32_groups",
    BF16: "fp32_groups_flat_partition",
    STAGE_3: "fp32_partitioned_groups_flat",
    UNFUSED: "fp32_groups",
}
GRADIENTS = {
    STAGES_1_AND_2: ("all_grad_tensors", "averaged_gradients"),  # stage 2 between micro-batches, both before the step
    BF16: ("fp32_groups_gradients_flat",),
    STAGE_3: ("grad_partitions_flat_buffer",),
}
COUNTS = ("global_steps", "global_samples", "skipped_steps")
SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
SCALER_HOLDERS = ("loss_scaler", "loss_scale_config")  # what ZeRO's wrappers call it, and the one of stage 0
PASSED = "megalr_passed"  # our mark of an engine that has made a backward pass since its last step
UNFILTERED = "megalr_write_events"  # our attribute of monitors that get some numbers from here alone
POSITION = "last_batch_iteration"  # of DeepSpeed's own schedules: their attribute, and all of their state
# What engine.save_checkpoint writes: model states, ZeRO's states, layers of a pipeline.
CHECKPOINT_FILES = ("mp_rank_*_model_states.pt", "*zero_pp_rank_*_states.pt", "layer_*-model_*.pt")

# What this file reads and writes of DeepSpeed, by whose it is; held by tests/deepspeed/test_contract.py.
INTERNALS = {
    ENGINE: (
        *COUNTS,
        "_is_gradient_accumulation_boundary",
        "basic_optimizer",
        "device",
        "fp16_enabled",
        "get_data_types",
        "get_global_grad_norm",
        "get_lr",
        "gradient_accumulation_steps",
        "is_gradient_accumulation_boundary",
        "lr_scheduler",
        "managed_gradient_accumulation",
        "micro_steps",
        "module",
        "monitor",
        "optimizer",
        "seq_data_parallel_group",
        "zero_optimization_stage",
        "zero_param_persistence_threshold",
    ),
    STAGES_1_AND_2: (
        MODEL_GROUPS[STAGES_1_AND_2],
        MASTERS[STAGES_1_AND_2],
        *GRADIENTS[STAGES_1_AND_2],
        "loss_scaler",
        "update_lp_params",
    ),
    BF16: (MODEL_GROUPS[BF16], MASTERS[BF16], *GRADIENTS[BF16], "update_lp_params"),
    STAGE_3: (
        MODEL_GROUPS[STAGE_3],
        MASTERS[STAGE_3],
        *GRADIENTS[STAGE_3],
        "checkpoint_event_prologue",
        "checkpoint_event_epilogue",
        "loss_scaler",
    ),
    UNFUSED: (MODEL_GROUPS[UNFUSED], MASTERS[UNFUSED], "loss_scale_config"),
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler": SCALER,
    "deepspeed.runtime.fp16.loss_scaler.LossScaleConfig": SCALER[:-1],
    zero_layouts.CUT: ("ds_tensor",),
    ACCUMULATING: ("grad_accum",),
    "a parameter of an expert": ("allreduce",),
    "a schedule of DeepSpeed's": (POSITION,),
    "deepspeed.monitor.monitor.MonitorMaster": ("write_events",),
    "deepspeed.zero": ("GatheredParameters",),
}


class DeepSpeed(Host):
    """DeepSpeed's ZeRO, at any stage, with tensor parallelism by AutoTP or of the user's own."""

    def read(self, named_groups: Sequence[NamedGroup], param_groups: Sequence[dict[str, Any]]) -> tuple[Shard, Shard]:
        local = zero_layouts.read_shard(named_groups, param_groups)
        return tensor_parallel.joined_shards(local, named_groups)

    def recognizes(self, parameter: Tensor) -> bool:
        marks = (zero_layouts.is_cut, zero_layouts.is_flat, tensor_parallel.is_marked, _is_expert)
        return any(has_mark(parameter) for has_mark in marks) or hasattr(parameter, tensor_parallel.AUTOTP)

    def held(self, parameter: Tensor) -> list[tuple[int, Tensor]]:
        return zero_layouts.held(parameter)

    def copies(self, parameter: Tensor) -> list[tuple[int, Tensor]]:
        return [*zero_layouts.held(parameter), *zero_layouts.secondary(parameter)]

    def logical_shape(self, parameter: Tensor) -> tuple[int, ...]:
        return zero_layouts.shape_of(parameter)

    def is_partitioned(self, parameter: Tensor) -> bool:
        return zero_layouts.is_cut(parameter)

    def is_replicated(self, parameter: Tensor) -> bool:
        return zero_layouts.is_gathered(parameter) and not _is_expert(parameter)

    def gather(self, parameters: Iterable[Tensor]) -> AbstractContextManager[Any]:
        cut = [parameter for parameter in parameters if zero_layouts.is_cut(parameter)]
        if not cut:
            return nullcontext()
        import deepspeed  # noqa: PLC0415  (slow to import, and what has cut them has imported it)

        gathered: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(cut)
        return gathered

    def check(self, config: Mapping[str, Any], data_size: int) -> None:
        check_deepspeed_config(config, data_size)


class DeepSpeedEngine(DeepSpeed, RunningHost):
    """What ``deepspeed.initialize`` returns, for a model whose layers are all on every rank."""

    def __init__(self, engine: Any) -> None:
        """
        Args:
            engine: DeepSpeed's.
        """
        self._engine = engine

    @property
    def module(self) -> nn.Module:
        module: nn.Module = self._engine.module
        return module

    @property
    def optimizer(self) -> Any:
        return self._engine.basic_optimizer

    @property
    def schedule(self) -> Any:
        return self._engine.lr_scheduler

    @property
    def device(self) -> torch.device:
        device: torch.device = self._engine.device
        return device

    @property
    def stage(self) -> int:
        return int(self._engine.zero_optimization_stage())

    @property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        dtype, gradient_dtype = self._engine.get_data_types()
        return dtype, gradient_dtype

    @property
    def persistence_threshold(self) -> int:
        return int(self._engine.zero_param_persistence_threshold())

    def groups(self) -> Groups:
        mpu = zero_layouts.told_of_parallelism()
        shared = tensor_parallel.ranks_that_share(mpu) > 1
        return Groups(self._engine.seq_data_parallel_group, tensor_parallel.tensor_parallel_group() if shared else None)

    def parameter_groups(self) -> list[list[Tensor]]:
        wrapper = self._engine.optimizer
        groups = [group["params"] for group in wrapper.param_groups]  # the model's own if nothing wraps them
        for name in MODEL_GROUPS.values():
            groups = getattr(wrapper, name, groups)
        return [[parameter for parameter in group if parameter.requires_grad] for group in groups]

    def ends_update(self) -> bool:
        if not self._counts_micro_batches():
            return True  # each step is, and the engine says so only while it runs
        return bool(self._engine.is_gradient_accumulation_boundary())

    def progress(self) -> tuple[int, int]:
        engine = self._engine
        size = int(engine.gradient_accumulation_steps())
        told = getattr(engine, "_is_gradient_accumulation_boundary", None) is not None
        return (0 if told or not self._counts_micro_batches() else engine.micro_steps % size), size

    @property
    def awaits_step(self) -> bool:
        return bool(getattr(self._engine, PASSED, False))

    def counters(self) -> dict[str, int]:
        return {key: getattr(self._engine, key) for key in COUNTS}

    def set_counters(self, counters: Mapping[str, int]) -> None:
        engine = self._engine
        for key in counters.keys() & set(COUNTS):  # and nothing else that a checkpoint names
            setattr(engine, key, counters[key])
        # Where an update ends is counted in micro-batches, of which an update may have more or fewer now.
        engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()

    def loss_scale(self) -> dict[str, Any]:
        if not self._engine.fp16_enabled():
            return {}
        scaler = self._loss_scaler()
        return {key: getattr(scaler, key) for key in SCALER if hasattr(scaler, key)}

    def set_loss_scale(self, state: Mapping[str, Any]) -> None:
        scaler = self._loss_scaler()
        for key in state.keys() & set(SCALER):
            setattr(scaler, key, state[key])

    def prepare_load(self) -> None:
        prologue = getattr(self._engine.optimizer, "checkpoint_event_prologue", None)
        if prologue is not None:
            prologue()

    def publish(self, shard: Shard) -> None:
        wrapper = self._engine.optimizer
        if hasattr(wrapper, "update_lp_params"):
            wrapper.update_lp_params()
        else:
            for buffer in range(len(shard.buffers)):
                shard.publish(buffer)
        zero_layouts.drop_secondary(self._engine.module.parameters())
        epilogue = getattr(wrapper, "checkpoint_event_epilogue", None)
        if epilogue is not None:
            epilogue()

    def refresh_rates(self) -> None:
        schedule = self._engine.lr_scheduler
        if hasattr(schedule, POSITION):
            schedule.step(getattr(schedule, POSITION))

    def tensors(self) -> EngineTensors:
        wrapper, parameters = self._engine.optimizer, list(self._engine.module.parameters())
        buffers = [name for names in GRADIENTS.values() for name in names]
        return EngineTensors(
            weights=[[p, getattr(p, "ds_tensor", None)] for p in parameters],
            masters=[getattr(wrapper, name, None) for name in MASTERS.values()],
            gradients=[
                [[p.grad, getattr(p, "grad_accum", None)] for p in parameters],
                [getattr(wrapper, name, None) for name in buffers],
            ],
        )

    def learning_rate(self) -> float:
        return float(self._engine.get_lr()[0])

    def gradient_norm(self) -> float | None:
        norm = self._engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    def report(self, numbers: Mapping[str, float]) -> None:
        samples, monitors = self._engine.global_samples, self._engine.monitor
        write = getattr(monitors, UNFILTERED, monitors.write_events)
        write([(name, number, samples) for name, number in numbers.items()])

    def report_alone(self, names: Collection[str]) -> None:
        from megalr.hosts.deepspeed_monitors import leave_out  # noqa: PLC0415  (it needs this module)

        leave_out(self._engine.monitor, names)

    def go_on_reporting(self, headed: Callable[[str, int], Collection[str]]) -> None:
        from megalr.hosts.deepspeed_monitors import go_on  # noqa: PLC0415  (it needs this module)

        go_on(self._engine.monitor, self._engine.global_samples, headed)

    def _counts_micro_batches(self) -> bool:
        """Whether the engine says where an update ends; otherwise each step is an update."""
        managed = getattr(self._engine, "managed_gradient_accumulation", None)
        return managed is None or bool(managed())

    def _loss_scaler(self) -> Any:
        """What holds fp16's loss scale; None if nothing does."""
        wrapper = self._engine.optimizer
        found = (getattr(wrapper, name, None) for name in SCALER_HOLDERS)
        return next((scaler for scaler in found if scaler is not None), None)


def refuse_experts(parameters: Mapping[str, Tensor]) -> None:
    """Raise a UserError for DeepSpeed's experts, of which ranks have different ones under one name."""
    expert = next((name for name, parameter in parameters.items() if _is_expert(parameter)), None)
    if expert is not None:
        raise UserError(
            f"{expert} belongs to a layer of deepspeed.moe, whose experts are others on each rank, and megalr takes "
            "what has one name for copies: have all experts on every rank, as in a ModuleList, at ZeRO stage 0, 1 or 3"
        )


def refuse_scalars(parameters: Mapping[str, Tensor]) -> None:
    """Raise a UserError for a parameter without dimensions, trained or not, which no engine of DeepSpeed takes.

    DeepSpeed sends the first rank's values as bytes, with one process as with many, and torch cannot view a tensor
    without dimensions as elements of another size.
    """
    scalar = next((n for n, p in parameters.items() if not zero_layouts.shape_of(p) and p.element_size() > 1), None)
    if scalar is not None:
        raise UserError(
            f"{scalar} has no dimensions, its shape is (), and DeepSpeed takes no such parameter: make it one of shape "
            "(1,), as in torch.nn.Parameter(p.detach().reshape(1)), or a buffer if it is not trained"
        )


def _is_expert(parameter: Tensor) -> bool:
    """DeepSpeed's mark of an expert, of which ranks have different ones."""
    return not getattr(parameter, "allreduce", True)
