"""apex's fused AdamW, where apex is installed and the tensors are on a GPU."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

# What apex's own FusedAdam passes: elements of a tensor for one block.
_CHUNK = 2048 * 32


@functools.cache
def kernels() -> ModuleType | None:
    """apex's compiled module ``amp_C``, or None."""
    try:
        return importlib.import_module("amp_C")
    except ImportError:  # not there, or compiled for another torch
        return None


def takes(*lists: Sequence[Tensor]) -> bool:
    """Whether apex's kernel can take these lists: fp32, dense and contiguous, on one GPU, of equal shapes."""
    weights = lists[0]
    if weights[0].device.type != "cuda" or kernels() is None:
        return False
    return all(
        len(tensors) == len(weights)
        and all(
            tensor.dtype == torch.float32
            and tensor.device == weights[0].device
            and tensor.is_contiguous()
            and tensor.shape == weight.shape
            for tensor, weight in zip(tensors, weights, strict=True)
        )
        for tensors in lists
    )


def adamw(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    steps: Sequence[int],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """The update of :func:`megalr.ops.adam.low_rank_adam`, as apex's ``FusedAdam`` makes it, by step counts.

    Args:
        weights, grads, exp_avgs, exp_avg_sqs: lists that :func:`takes` has accepted.
        steps, lr, betas, eps, weight_decay: as in ``low_rank_adam``.
    """
    module = kernels()
    assert module is not None
    groups: dict[int, list[int]] = {}
    for i, step in enumerate(steps):
        groups.setdefault(step, []).append(i)
    overflow = torch.zeros(1, dtype=torch.int32, device=weights[0].device)  # apex asks for it; AdamW never sets it
    for step, members in groups.items():
        lists = [[tensors[i] for i in members] for tensors in (grads, weights, exp_avgs, exp_avg_sqs)]
        adam_w_mode = bias_correction = 1
        module.multi_tensor_adam(
            _CHUNK, overflow, lists, lr, *betas, eps, step, adam_w_mode, bias_correction, weight_decay
        )
