"""Adam's element-wise updates on many tensors in one call: compiled where that can be had, else torch calls.

What runs where is chosen in :mod:`megalr.ops.library`; ``python -m megalr.report`` prints it. All functions take lists
of tensors, of any shapes, contiguous and on one device, fp32 or bf16 with one dtype in a list; arithmetic is in fp32.
What does not fit raises a ``ValueError`` that names the list and the index. Empty lists and empty tensors are fine.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megalr.ops.checks import check_tensors
from megalr.ops.library import run


@torch.no_grad()
def momentum_reset(tensors: Sequence[Tensor]) -> None:
    """Zeros into every tensor, in place, in one pass (one launch on a GPU). Source: arXiv 2505.22922.

    Args:
        tensors: moments of any shapes; modified in place.
    """
    run("momentum_reset", tensors)


@torch.no_grad()
def low_rank_adam(
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
    reset: bool = False,
) -> None:
    """AdamW (arXiv 1711.05101) of many tensors, each with its own step count; all but ``grads`` is modified in place.

    m = β1 m + (1-β1) g,  v = β2 v + (1-β2) g²,  w -= lr · (m / (1-β1^t) / (√(v / (1-β2^t)) + ε) + λ w)

    Args:
        weights, grads, exp_avgs, exp_avg_sqs: lists of one length, with equal shapes at each index.
        steps: t of each tensor, the updates since its moments were zero, this one included; at least 1.
        lr, betas, eps, weight_decay: as in ``torch.optim.AdamW``.
        reset: the update is made with the moments, and zeros are stored in their place: the momentum reset of
            arXiv 2505.22922 at no cost. The caller starts its step counts again.

    Raises:
        ValueError: a tensor or a count does not fit; the message says which, and what to write.
    """
    run("low_rank_adam", weights, grads, exp_avgs, exp_avg_sqs, steps, lr, *betas, eps, weight_decay, reset)


@torch.no_grad()
def projected_adam(
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    steps: Sequence[int],
    betas: tuple[float, float],
    eps: float,
    scale: float = 1.0,
) -> list[Tensor]:
    """Adam's direction inside a subspace, scale · m̂ / (√v̂ + ε) (arXiv 1412.6980; GaLore, arXiv 2403.03507).

    Args:
        grads: projected gradients.
        exp_avgs, exp_avg_sqs: as many, of the same shapes; modified in place.
        steps: t of each tensor, this update included; at least 1.
        betas, eps: as in Adam.
        scale: what every direction is multiplied by.

    Returns:
        New contiguous fp32 tensors of the gradients' shapes.

    Raises:
        ValueError: a tensor or a count does not fit; the message says which, and what to write.
    """
    check_tensors("projected_adam", "grads", grads)
    # The op fills what it is given: torch.compile takes no op that returns a list.
    directions = [torch.empty(grad.shape, dtype=torch.float32, device=grad.device) for grad in grads]
    run("projected_adam", directions, grads, exp_avgs, exp_avg_sqs, steps, *betas, eps, scale)
    return directions


@torch.no_grad()
def stable_spam_adam(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    statistics: Tensor,
    *,
    clip_steps: Sequence[int],
    bias1: Sequence[float],
    bias2: Sequence[float],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    gammas: tuple[float, float],
    theta: float,
    norm_eps: float,
) -> None:
    """AdamW on clipped and rescaled gradients (Stable-SPAM, arXiv 2502.17055); all but ``grads`` is modified in place.

    Of each tensor, with k its clip step and n the norm of its clipped gradient:

    - M = θ M + (1-θ) max|g|, and entries above M̂ = M / (1-θ^k) in magnitude are multiplied by M̂ / max|g|;
    - a = γ1 a + (1-γ1) n, b = γ2 b + (1-γ2) n², and g becomes g / n · â / (√b̂ + norm_eps), both corrected with k;
    - AdamW as in :func:`low_rank_adam`, with the bias corrections that are given.

    A zero gradient stays zero, and its statistics decay.

    Args:
        weights, grads, exp_avgs, exp_avg_sqs: lists of one length, with equal shapes at each index.
        statistics: (n, 3), fp32: row i is M, a, b of tensor i; zeros at first.
        clip_steps: k of each tensor, the updates since its statistics were zero, this one included. A momentum reset
            that leaves the statistics leaves k too: the published code shares it with Adam's count, and the statistics
            are inflated after every reset.
        bias1, bias2: 1 - the product of β over each tensor's updates since its moments were zero, this one included;
            given, since β1 may change from step to step.
        lr, betas, eps, weight_decay: as in ``torch.optim.AdamW``.
        gammas: γ1, γ2.
        theta, norm_eps: as above.

    Raises:
        ValueError: a tensor or a count does not fit; the message says which, and what to write.
    """
    run(
        "stable_spam_adam",
        weights,
        grads,
        exp_avgs,
        exp_avg_sqs,
        statistics,
        clip_steps,
        bias1,
        bias2,
        lr,
        *betas,
        eps,
        weight_decay,
        *gammas,
        theta,
        norm_eps,
    )
