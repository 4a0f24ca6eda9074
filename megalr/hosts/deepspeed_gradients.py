"""Gradients that DeepSpeed keeps from one update to the next, and would use again without a word.

Where ZeRO keeps gradients in buffers of its own, at stage 3 and for an optimizer on the CPU, a backward pass overwrites
those of the parameters that it reaches. Others, as those of a branch or an expert that nobody has used, keep their
gradient of an earlier update. Here it is a zero.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from megalr.hosts.zero_layouts import CUT, STAGE_3

STAGE_3_ON_CPU = "the wrapper of an optimizer on the CPU at stage 3"
STAGE_2_ON_CPU = "the wrapper of an optimizer on the CPU at stages 1 and 2"

# What this file reads and writes of DeepSpeed; held by tests/deepspeed/test_contract.py.
INTERNALS = {
    STAGE_3: (
        "fp16_groups",
        "grad_partitions_flat_buffer",
        "offload_optimizer",
        "partition_grads",
        "zero_grad",
        "_pre_step",
    ),
    STAGE_3_ON_CPU: ("norm_for_param_grads", "get_param_id", "_offload_grad_partition_at_boundary"),
    STAGE_2_ON_CPU: (
        "cpu_offload",
        "get_param_id",
        "grad_position",
        "norm_for_param_grads",
        "params_in_partition",
        "single_partition_of_fp32_groups",
        "step",
    ),
    CUT: ("partition_numel",),
}


def forget_old_gradients(wrapper: Any) -> None:
    """Have each update begin without the gradients of those before.

    Args:
        wrapper: what DeepSpeed puts around the base optimizer; those that keep no gradients are left alone.
    """
    if hasattr(wrapper, "grad_partitions_flat_buffer"):
        _at_stage_3(wrapper)
    elif getattr(wrapper, "cpu_offload", False):
        _at_stage_2_on_cpu(wrapper)


def _at_stage_3(wrapper: Any) -> None:
    # Gradients stay to be looked at until the next update's first come.
    are_old = False

    def marking(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def mark(*args: Any, **kwargs: Any) -> Any:
            nonlocal are_old
            are_old = True
            return original(*args, **kwargs)

        return mark

    original, begin = wrapper.partition_grads, wrapper._pre_step

    def partition_grads(*args: Any, **kwargs: Any) -> Any:
        nonlocal are_old
        if are_old:
            wrapper.grad_partitions_flat_buffer.zero_()
            are_old = False
        return original(*args, **kwargs)

    def pre_step() -> None:
        if wrapper.offload_optimizer:
            _hand_over(wrapper)
        begin()

    wrapper.partition_grads = partition_grads
    wrapper.zero_grad = marking(wrapper.zero_grad)
    wrapper._pre_step = marking(pre_step)


def _hand_over(wrapper: Any) -> None:
    """Give the masters on the CPU the gradients that the update's last backward pass has not given them."""
    start = 0
    for parameter in (p for group in wrapper.fp16_groups for p in group):
        size = parameter.partition_numel()
        if parameter.requires_grad and wrapper.get_param_id(parameter) not in wrapper.norm_for_param_grads:
            kept = wrapper.grad_partitions_flat_buffer.narrow(0, start, size)
            wrapper._offload_grad_partition_at_boundary(parameter, kept, {}, {})
        start += size


def _at_stage_2_on_cpu(wrapper: Any) -> None:
    original = wrapper.step

    @functools.wraps(original)
    def step(*args: Any, **kwargs: Any) -> Any:
        for parameter in (p for group in wrapper.params_in_partition for p in group):
            identity = wrapper.get_param_id(parameter)
            if identity not in wrapper.norm_for_param_grads:
                group, _, start, size = wrapper.grad_position[identity]
                wrapper.single_partition_of_fp32_groups[group].grad.view(-1).narrow(0, start, size).zero_()
        return original(*args, **kwargs)

    wrapper.step = step
