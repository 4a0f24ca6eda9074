"""What the element-wise ops compute, written plainly in fp64 for one tensor, and inputs for them."""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch

from megalr.ops import library

NAMES = ("momentum_reset", "low_rank_adam", "projected_adam", "stable_spam_adam")
LR, BETA1, BETA2, EPS, DECAY = 3e-3, 0.9, 0.999, 1e-8, 0.1
GAMMA1, GAMMA2, THETA, NORM_EPS = 0.7, 0.9, 0.999, 1e-6

# One element, vectors' tails, a matrix, nothing, many rows, and one that several threads share.
SHAPES = [(1,), (7, 5), (0,), (64, 48), (3, 0), (1023,), (2, 3, 4), (130, 1031)]


def ops(implementation: str) -> SimpleNamespace:
    """The ops by name, of one implementation; called with the schema's arguments in order."""
    if implementation == "torch":
        return SimpleNamespace(**{name: library.reference(name) for name in NAMES})
    library.load("cpu")
    return SimpleNamespace(**{name: getattr(torch.ops.megalr, name).default for name in NAMES})


def directions_of(ops, grads, *rest):
    """What projected_adam fills tensors with."""
    directions = [torch.full(grad.shape, math.nan, device=grad.device) for grad in grads]
    ops.projected_adam(directions, grads, *rest)
    return directions


def inputs(shapes=SHAPES, dtypes=(torch.float32,) * 3, seed=0, views=False):
    """Weights, gradients (some of them spiky) and moments after some updates; lists in the schema's order."""
    generator = torch.Generator().manual_seed(seed)

    def make(shape, dtype):
        extra = 1 if views else 0  # data that start in the middle of a vector
        flat = torch.randn(math.prod(shape) + extra, generator=generator).to(dtype)
        return flat[extra:].view(shape)

    weight, grad, moment = dtypes
    weights = [make(shape, weight) for shape in shapes]
    grads = [make(shape, grad).mul_(0.1) for shape in shapes]
    for one in grads[::2]:
        one.view(-1)[:1].mul_(100)
    exp_avgs = [make(shape, moment).mul_(0.05) for shape in shapes]
    exp_avg_sqs = [make(shape, moment).square_().mul_(0.01) for shape in shapes]
    return weights, grads, exp_avgs, exp_avg_sqs


def copies(lists):
    return [[tensor.clone() for tensor in tensors] for tensors in lists]


def direction(g, m, v, bias1, bias2):
    """New first and second moment and m̂ / (√v̂ + ε), all fp64."""
    g, m, v = g.double(), m.double(), v.double()
    m = BETA1 * m + (1 - BETA1) * g
    v = BETA2 * v + (1 - BETA2) * g * g
    return m, v, (m / bias1) / ((v / bias2).sqrt() + EPS)


def adamw(w, g, m, v, bias1, bias2):
    m, v, update = direction(g, m, v, bias1, bias2)
    return w.double() - LR * (update + DECAY * w.double()), m, v


def stable(g, statistics, k):
    """The clipped and rescaled gradient and the new statistics, fp64."""
    g = g.double()
    M, a, b = (float(x) for x in statistics)  # noqa: N806
    largest = float(g.abs().max()) if g.numel() else 0.0
    M = THETA * M + (1 - THETA) * largest  # noqa: N806
    limit = M / (1 - THETA**k)
    if largest > limit:
        g = torch.where(g.abs() > limit, g * (limit / largest), g)
    norm = float(g.norm())
    a = GAMMA1 * a + (1 - GAMMA1) * norm
    b = GAMMA2 * b + (1 - GAMMA2) * norm**2
    if norm > 0:
        g = g / norm * (a / (1 - GAMMA1**k)) / (math.sqrt(b / (1 - GAMMA2**k)) + NORM_EPS)
    return g, [M, a, b]
