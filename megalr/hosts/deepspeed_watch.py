"""What DeepSpeed's engine would do wrongly, without a word, with our optimizer in it.

A job may call ``deepspeed.initialize`` itself, or leave that to a Trainer, so there is no engine to look at when our
optimizer is built. Seven methods of DeepSpeed's class of engines are wrapped instead, once for a process. They do more
for an engine whose optimizer :func:`watch` was given; any other engine is left as it is.
"""

from __future__ import annotations

import functools
import inspect
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from megalr.errors import UserError
from megalr.hosts import zero_layouts
from megalr.hosts.deepspeed import (
    ACCUMULATING,
    ENGINE,
    PASSED,
    STAGES_1_AND_2,
    UNFUSED,
    DeepSpeedEngine,
    refuse_scalars,
)
from megalr.hosts.deepspeed_config import refuse_unsupported
from megalr.hosts.deepspeed_gradients import forget_old_gradients
from megalr.hosts.deepspeed_monitors import outlive_monitors
from megalr.hosts.deepspeed_pipeline import join_stages
from megalr.naming import named_parameters

ENGINES = "deepspeed.runtime.engine"
METRIC = "metrics"  # the argument by which torch's ReduceLROnPlateau gets one
WEIGHTS_OF_STAGE_3 = "get_fp32_state_dict_from_zero_checkpoint"

# What this file reads and writes of DeepSpeed; held by tests/deepspeed/test_contract.py.
INTERNALS = {
    ENGINES: ("DeepSpeedEngine", WEIGHTS_OF_STAGE_3),
    ENGINE: (
        "_is_gradient_accumulation_boundary",
        "_step_applied",
        "_take_model_step",
        "backward",
        "basic_optimizer",
        "global_steps",
        "gradient_accumulation_steps",
        "load_checkpoint",
        "lr_scheduler",
        "managed_gradient_accumulation",
        "micro_steps",
        "module",
        "optimizer",
        "pipeline_parallelism",
        "set_train_batch_size",
        "set_train_micro_batch_size",
        "skipped_steps",
        "step",
        "zero_optimization_stage",
    ),
    "the configuration of an engine": ("_param_dict",),
    STAGES_1_AND_2: (
        "_coalesce_grad_reduction",
        "bit16_groups",
        "cpu_offload",
        "get_gradient_for_reduction",
        "gradient_accumulation_dtype",
        "overlap_comm",
        "partition_gradients",
        "reduce_gradients",
        "use_grad_accum_attribute",
    ),
    ACCUMULATING: ("grad_accum",),
    UNFUSED: ("refresh_fp32_params",),
}

_watched: weakref.WeakSet[Any] = weakref.WeakSet()


def watch(optimizer: Any) -> None:
    """Have the engine that takes this optimizer check its configuration, and what it is asked to do later.

    Where DeepSpeed has not been imported yet, nothing can be wrapped; a later call does it.

    Args:
        optimizer: what ``deepspeed.initialize`` is to be given.
    """
    _watched.add(optimizer)
    engines = sys.modules.get(ENGINES)
    engine_class = getattr(engines, "DeepSpeedEngine", None)
    if engine_class is None or getattr(engine_class, "megalr_watches", False):
        return
    engine_class.megalr_watches = True
    wrappers = {
        "__init__": _made,
        "backward": _passed,
        "step": _stepped,
        "_take_model_step": _updated,
        "load_checkpoint": _loading,
        "set_train_batch_size": _resized,
        "set_train_micro_batch_size": _resized,
    }
    for name, wrapper in wrappers.items():
        setattr(engine_class, name, wrapper(getattr(engine_class, name)))


def _is_ours(engine: Any) -> bool:
    return getattr(engine, "basic_optimizer", None) in _watched


def _made(original: Callable[..., None]) -> Callable[..., None]:
    """An engine is made: refuse by name what megalr cannot do, before it is."""

    @functools.wraps(original)
    def init(engine: Any, *args: Any, **kwargs: Any) -> None:
        given = inspect.signature(original).bind(engine, *args, **kwargs).arguments
        content = getattr(given.get("config_class"), "_param_dict", None)
        if content is not None and given.get("optimizer") in _watched:
            refuse_unsupported(content)
            refuse_scalars(dict(named_parameters(given["model"])))
        original(engine, *args, **kwargs)
        if _is_ours(engine):
            if content is not None:  # a callable has made the optimizer only now
                refuse_unsupported(content)
            _reduce_all(engine.optimizer)
            forget_old_gradients(engine.optimizer)
            outlive_monitors(engine)
            join_stages(engine)

    return init


def _resized(original: Callable[..., None]) -> Callable[..., None]:
    """A batch gets another size: updates begin with their first micro-batch all the same."""

    @functools.wraps(original)
    def resize(engine: Any, *args: Any, **kwargs: Any) -> None:
        if not _is_ours(engine):
            return original(engine, *args, **kwargs)
        _refuse_in_mid_update(engine, original.__name__)
        original(engine, *args, **kwargs)
        # DeepSpeed takes an update to end where micro_steps + 1 is a multiple of the micro-batches of an update.
        engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()
        return None

    return resize


def _passed(original: Callable[..., Any]) -> Callable[..., Any]:
    """A backward pass: the only one of its micro-batch, where DeepSpeed would lose gradients of the others."""

    @functools.wraps(original)
    def backward(engine: Any, *args: Any, **kwargs: Any) -> Any:
        if _is_ours(engine):
            is_second = getattr(engine, PASSED, False) or getattr(engine.optimizer, "_coalesce_grad_reduction", False)
            if is_second and _wants_one_pass(engine):
                raise UserError(
                    "engine.backward was called twice before engine.step. ZeRO's stages 1 and 2 lose gradients by that "
                    "where gradient_accumulation_steps is not 1: add the losses up and call engine.backward once, or "
                    'write "managed_gradient_accumulation": false, and call engine.step once for each update'
                )
            setattr(engine, PASSED, True)
        return original(engine, *args, **kwargs)

    return backward


def _stepped(original: Callable[..., Any]) -> Callable[..., Any]:
    """A micro-batch is over."""

    @functools.wraps(original)
    def step(engine: Any, *args: Any, **kwargs: Any) -> Any:
        if _is_ours(engine):
            _refuse_no_metric(engine.lr_scheduler, *args, **kwargs)
        if hasattr(engine, PASSED):
            setattr(engine, PASSED, False)
        return original(engine, *args, **kwargs)

    return step


def _updated(original: Callable[..., None]) -> Callable[..., None]:
    """An update is over, made or not: whoever skips it, the others are told, and its schedule stays where it was.

    DeepSpeed tells its optimizer nothing of updates that it skips itself, and knows nothing of those that the optimizer
    skips.
    """

    @functools.wraps(original)
    def take_step(engine: Any, *args: Any, **kwargs: Any) -> None:
        if not _is_ours(engine):
            return original(engine, *args, **kwargs)
        optimizer, schedule = engine.basic_optimizer, engine.lr_scheduler
        before = optimizer.updates
        if schedule is not None:
            engine.lr_scheduler = _OfUpdates(schedule, optimizer)
        try:
            original(engine, *args, **kwargs)
        finally:
            engine.lr_scheduler = schedule
        if optimizer.updates == before and engine._step_applied:
            engine._step_applied = False
            engine.skipped_steps += 1
        optimizer.begin_update()
        return None

    return take_step


class _OfUpdates:
    """A schedule that makes its step only if the optimizer has made an update."""

    def __init__(self, schedule: Any, optimizer: Any) -> None:
        self._schedule, self._optimizer, self._before = schedule, optimizer, optimizer.updates

    def step(self, *args: Any, **kwargs: Any) -> None:
        if self._optimizer.updates > self._before:
            self._schedule.step(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._schedule, name)


def _refuse_no_metric(schedule: Any, lr_kwargs: Mapping[str, Any] | None = None) -> None:
    """Refuse a step of a schedule that looks at a metric, without one: DeepSpeed hands it the batch size instead."""
    if schedule is not None and _wants_metric(type(schedule)) and METRIC not in (lr_kwargs or {}):
        raise UserError(
            f"the schedule {type(schedule).__name__} looks at a metric after each update, and DeepSpeed would give it "
            f'the batch size: call engine.step(lr_kwargs={{"{METRIC}": loss}}), with a number that all ranks share, or '
            "give another lr_scheduler"
        )


def _wants_metric(schedule: type) -> bool:
    """Whether the ``step`` of a class of schedules needs one, as that of ReduceLROnPlateau."""
    step = getattr(schedule, "step", None)
    wanted = inspect.signature(step).parameters.get(METRIC) if callable(step) else None
    return wanted is not None and wanted.default is inspect.Parameter.empty


def _wants_one_pass(engine: Any) -> bool:
    """Whether the engine counts micro-batches to find where an update ends, at stages 1 and 2."""
    return (
        hasattr(engine.optimizer, "partition_gradients")
        and not getattr(engine, "pipeline_parallelism", False)
        and engine.gradient_accumulation_steps() > 1
        and engine.managed_gradient_accumulation()
        and engine._is_gradient_accumulation_boundary is None
    )


def _loading(original: Callable[..., Any]) -> Callable[..., Any]:
    """A checkpoint of DeepSpeed's is loaded: the one that was asked for, into all that keeps weights."""

    @functools.wraps(original)
    def load(engine: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_ours(engine):
            return original(engine, *args, **kwargs)
        _refuse_in_mid_update(engine, original.__name__)
        call = inspect.signature(original).bind(engine, *args, **kwargs)
        call.apply_defaults()
        options = call.arguments
        weights_alone = options["load_module_only"] or not options["load_optimizer_states"]
        stage = engine.zero_optimization_stage()
        with _weights_of(options["tag"]):
            if weights_alone and stage == 3:
                # Else it takes the model's tensors, which stage 3 has emptied.
                options["load_optimizer_states"] = False
            answer = original(*call.args, **call.kwargs)
        wrapper = engine.optimizer
        if weights_alone and stage == 0 and hasattr(wrapper, "refresh_fp32_params"):
            wrapper.refresh_fp32_params()  # else the next update casts the old masters over what was loaded
        zero_layouts.drop_secondary(engine.module.parameters())
        return answer

    return load


def _reduce_all(wrapper: Any) -> None:
    """Have stage 1 add up the gradients of all parameters, a zero for one that this rank has not used.

    DeepSpeed adds up buckets of what has a gradient here: where ranks have used different parameters, as those of
    experts, gradients of one would be added to those of another. Stage 2, and stage 1 with ``overlap_comm``, fill
    buckets during the backward pass, so ranks are compared there (``optim/arrivals.py``). There the last pass of an
    update has to reach what any has, with ``overlap_comm`` at stage 1 and with the optimizer on the CPU at stage 2.
    """
    cuts = getattr(wrapper, "partition_gradients", None)
    if cuts is None:  # no wrapper of stages 1 and 2
        return
    mark = zero_layouts.IN_LAST_PASS if cuts or wrapper.overlap_comm else zero_layouts.IN_ANY_ORDER
    for parameter in (p for group in wrapper.bit16_groups for p in group if not cuts or wrapper.cpu_offload):
        setattr(parameter, mark, True)
    if cuts or wrapper.overlap_comm:
        return
    original = wrapper.reduce_gradients

    def reduce_gradients(*args: Any, **kwargs: Any) -> None:
        for parameter in (p for group in wrapper.bit16_groups for p in group if p.requires_grad):
            if wrapper.get_gradient_for_reduction(parameter) is None:
                if wrapper.use_grad_accum_attribute:
                    parameter.grad_accum = torch.zeros_like(parameter, dtype=wrapper.gradient_accumulation_dtype)
                else:
                    parameter.grad = torch.zeros_like(parameter)
        original(*args, **kwargs)

    wrapper.reduce_gradients = reduce_gradients


def _refuse_in_mid_update(engine: Any, method: str) -> None:
    if getattr(engine, "pipeline_parallelism", False):
        return
    host = DeepSpeedEngine(engine)
    done, size = host.progress()
    if done or host.awaits_step:
        last = ", and after a backward pass that waits for its step" if host.awaits_step else ""
        raise UserError(
            f"engine.{method} was called after {done} of {size} micro-batches of an update{last}: call it between two "
            "updates, after the engine.step() that ends one"
        )


@contextmanager
def _weights_of(tag: str | None) -> Iterator[None]:
    """At stage 3 DeepSpeed reads weights alone from the newest checkpoint, whichever it is asked for."""
    engines: Any = sys.modules[ENGINES]
    original = getattr(engines, WEIGHTS_OF_STAGE_3)
    setattr(engines, WEIGHTS_OF_STAGE_3, functools.partial(original, tag=tag))
    try:
        yield
    finally:
        setattr(engines, WEIGHTS_OF_STAGE_3, original)
