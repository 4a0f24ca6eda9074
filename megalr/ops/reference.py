"""The element-wise ops as torch calls: what runs where nothing is compiled, and what the compiled ops are held to.

A tensor of another dtype than fp32 is computed in fp32 and rounded back. No value is read by the host. The checks of
each are its ``_fake``; :func:`megalr.ops.library.reference` makes them first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from megalr.ops import checks


def momentum_reset_reference(tensors: Sequence[Tensor]) -> None:
    if tensors:
        torch._foreach_zero_(list(tensors))


def momentum_reset_fake(tensors: Sequence[Tensor]) -> None:
    checks.check_lists("momentum_reset", tensors=tensors)


def low_rank_adam_reference(
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
    if not weights:
        return
    w, g, m, v = ([tensor.float() for tensor in tensors] for tensors in (weights, grads, exp_avgs, exp_avg_sqs))
    # torch's fused kernel reads and writes each element once; the step count it advances is a copy.
    counts = [torch.full((), step - 1, dtype=torch.float32, device=weights[0].device) for step in steps]
    adamw(
        w,
        g,
        m,
        v,
        [],
        counts,
        fused=True,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=lr,
        weight_decay=weight_decay,
        eps=eps,
        maximize=False,
    )
    _store(weights, w)
    if reset:
        torch._foreach_zero_([*exp_avgs, *exp_avg_sqs])
    else:
        _store(exp_avgs, m)
        _store(exp_avg_sqs, v)


def low_rank_adam_fake(
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
    op = "low_rank_adam"
    checks.check_lists(op, weights=weights, grads=grads, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs)
    checks.check_steps(op, "steps", steps, "weights", weights)


def projected_adam_reference(
    directions: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[int],
    beta1: float,
    beta2: float,
    eps: float,
    scale: float,
) -> None:
    for direction, grad, exp_avg, exp_avg_sq, step in zip(directions, grads, exp_avgs, exp_avg_sqs, steps, strict=True):
        biases = (1 - beta1**step, 1 - beta2**step)
        _direction(grad.float(), exp_avg, exp_avg_sq, beta1, beta2, biases, eps, out=direction)
        direction.mul_(scale)


def projected_adam_fake(
    directions: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[int],
    beta1: float,
    beta2: float,
    eps: float,
    scale: float,
) -> None:
    op = "projected_adam"
    checks.check_lists(op, grads=grads, directions=directions, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs)
    checks.check_float(op, "directions", directions)
    checks.check_steps(op, "steps", steps, "grads", grads)


def stable_spam_adam_reference(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    statistics: Tensor,
    clip_steps: Sequence[int],
    bias1: Sequence[float],
    bias2: Sequence[float],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    gamma1: float,
    gamma2: float,
    theta: float,
    norm_eps: float,
) -> None:
    for i, (weight, grad) in enumerate(zip(weights, grads, strict=True)):
        scaled = _stable(grad.float(), statistics[i], clip_steps[i], gamma1, gamma2, theta, norm_eps)
        direction = torch.empty_like(scaled)
        biases = (bias1[i], bias2[i])
        _direction(scaled, exp_avgs[i], exp_avg_sqs[i], beta1, beta2, biases, eps, out=direction)
        w = weight.float()
        weight.copy_(w.mul_(1 - lr * weight_decay).sub_(direction, alpha=lr))


def stable_spam_adam_fake(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    statistics: Tensor,
    clip_steps: Sequence[int],
    bias1: Sequence[float],
    bias2: Sequence[float],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    gamma1: float,
    gamma2: float,
    theta: float,
    norm_eps: float,
) -> None:
    op = "stable_spam_adam"
    checks.check_lists(op, weights=weights, grads=grads, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs)
    checks.check_statistics(op, statistics, "weights", weights)
    checks.check_steps(op, "clip_steps", clip_steps, "weights", weights)
    checks.check_bias(op, "bias1", bias1, "weights", weights)
    checks.check_bias(op, "bias2", bias2, "weights", weights)


def _direction(
    grad: Tensor,  # fp32
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    beta1: float,
    beta2: float,
    biases: tuple[float, float],
    eps: float,
    *,
    out: Tensor,  # fp32
) -> None:
    """out = m̂ / (√v̂ + ε) of Adam (arXiv 1412.6980); both moments are modified in place."""
    m, v = exp_avg.float(), exp_avg_sq.float()
    m.lerp_(grad, 1 - beta1)
    v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    torch.sqrt(v, out=out)
    out.div_(math.sqrt(biases[1])).add_(eps)
    torch.div(m, out, out=out)
    out.div_(biases[0])
    _store([exp_avg, exp_avg_sq], [m, v])


def _stable(
    grad: Tensor,  # fp32
    row: Tensor,  # (3,) of M, a, b; modified in place
    k: int,
    gamma1: float,
    gamma2: float,
    theta: float,
    norm_eps: float,
) -> Tensor:
    """The gradient with its spikes clipped and its norm smoothed (Stable-SPAM, arXiv 2502.17055, AdaClip and AdaGN).

    The three statistics of a tensor are computed in fp64, as 1 - θ is small.
    """
    size = grad.abs()
    largest = size.amax().double() if grad.numel() else row.new_zeros((), dtype=torch.float64)
    mean, a, b = row.double()
    mean = theta * mean + (1 - theta) * largest
    threshold = mean / (1 - theta**k)
    shrink = torch.where(largest > 0, threshold / largest, 1.0).float()
    clipped = torch.where(size > threshold.float(), grad * shrink, grad)
    norm = torch.linalg.vector_norm(clipped, dtype=torch.float64)
    a = gamma1 * a + (1 - gamma1) * norm
    b = gamma2 * b + (1 - gamma2) * norm * norm
    row.copy_(torch.stack((mean, a, b)))
    gain = a / (1 - gamma1**k) / ((b / (1 - gamma2**k)).sqrt() + norm_eps)
    return clipped.div_(torch.where(norm > 0, norm, 1.0).float()).mul_(gain.float())


def _store(into: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for old, new in zip(into, values, strict=True):
        if old is not new:  # float() of an fp32 tensor is the tensor
            old.copy_(new)
