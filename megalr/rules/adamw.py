"""AdamW: decoupled weight decay, arXiv 1711.05101."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw


def adamw_(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One AdamW update of any run of elements; ``weight`` and both moments are modified in place.

    m = β1 m + (1-β1) g,  v = β2 v + (1-β2) g²,  w -= lr · (m / (1-β1^t) / (√(v / (1-β2^t)) + ε) + λ w)

    Args:
        weight, grad, exp_avg, exp_avg_sq: 1-D tensors of one length and device, fp32.
        step: t, the updates since the moments were zero, this one included; at least 1.
        lr, betas, eps, weight_decay: as in ``torch.optim.AdamW``.
    """
    runs = ([weight], [grad], [exp_avg], [exp_avg_sq])
    adamw_runs_(*runs, steps=[step], lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)


def adamw_runs_(
    weights: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    *,
    steps: Sequence[int],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """:func:`adamw_` for many runs of one device in one call, each with a step count of its own."""
    # torch's fused kernel reads and writes each element once; the step count it advances is a copy.
    device = weights[0].device
    counts = [torch.full((), step - 1, dtype=torch.float32, device=device) for step in steps]  # nothing to wait for
    adamw(
        weights,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        counts,
        fused=True,
        amsgrad=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=lr,
        weight_decay=weight_decay,
        eps=eps,
        maximize=False,
    )
