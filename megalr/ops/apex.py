"""apex's fused AdamW, where apex is installed and the tensors are on a GPU; megalr.ops.library chooses it."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from megalr.ops.reference import low_rank_adam_fake

# What apex's own FusedAdam passes: elements of a tensor for one block.
_CHUNK = 2048 * 32


@functools.cache
def kernels() -> ModuleType | None:
    """apex's compiled module ``amp_C``, or None."""
    try:
        return importlib.import_module("amp_C")
    except ImportError:  # not there, or compiled for another torch
        return None


def low_rank_adam(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[int],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    reset: bool,
) -> None:
    """The op of this name, as apex's ``FusedAdam`` makes it, by step counts; with a reset or bf16 the op itself."""
    lists = (weights, grads, exp_avgs, exp_avg_sqs)
    if reset or any(tensor.dtype != torch.float32 for tensors in lists for tensor in tensors[:1]):
        torch.ops.megalr.low_rank_adam.default(*lists, steps, lr, beta1, beta2, eps, weight_decay, reset)
        return
    low_rank_adam_fake(*lists, steps, lr, beta1, beta2, eps, weight_decay, reset)
    module = kernels()
    assert module is not None
    groups: dict[int, list[int]] = {}
    for i, step in enumerate(steps):
        groups.setdefault(step, []).append(i)
    overflow = torch.zeros(1, dtype=torch.int32, device=weights[0].device)  # apex asks for it; AdamW never sets it
    for step, members in groups.items():
        some = [[tensors[i] for i in members] for tensors in (grads, weights, exp_avgs, exp_avg_sqs)]
        adam_w_mode = bias_correction = 1
        module.multi_tensor_adam(
            _CHUNK, overflow, some, lr, beta1, beta2, eps, step, adam_w_mode, bias_correction, weight_decay
        )
