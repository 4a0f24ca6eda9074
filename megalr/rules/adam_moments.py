"""Adam's moments as the state of a rule: their start, the direction that they give, resets and rotations."""

from __future__ import annotations

import torch
from torch import Tensor

from megalr.ops import momentum_reset, projected_adam
from megalr.rules.base import State, count, tensor


def adam_state(shape: tuple[int, int], device: torch.device | str) -> State:
    """Zero moments and a zero count."""
    return {"step": 0, "exp_avg": torch.zeros(shape, device=device), "exp_avg_sq": torch.zeros(shape, device=device)}


def adam_direction(grad: Tensor, state: State, betas: tuple[float, float], eps: float, scale: float = 1.0) -> Tensor:
    """scale · N, N = m̂ / (√v̂ + ε) of Adam (arXiv 1412.6980), with bias-corrected moments; the state changes in place.

    Args:
        grad: of the moments' shape, fp32.
        state: "step", "exp_avg", "exp_avg_sq".
        betas, eps: as in Adam.
        scale: a factor on the result.
    """
    state["step"] = count(state, "step") + 1
    moments = [tensor(state, "exp_avg")], [tensor(state, "exp_avg_sq")]
    steps = [count(state, "step")]
    return projected_adam([grad.contiguous()], *moments, steps=steps, betas=betas, eps=eps, scale=scale)[0]


def reset_moments(state: State) -> None:
    """Moments and count become zero, in place."""
    momentum_reset([tensor(state, "exp_avg"), tensor(state, "exp_avg_sq")])
    state["step"] = 0


def rotate_moments(state: State, turn: Tensor, *, left: bool, second: bool = True) -> None:
    """Carry the moments into another basis, in place.

    The first moment maps as gradients do. The second has no exact map; squared coefficients are right for gradients
    whose coordinates are uncorrelated.

    Args:
        state: "exp_avg" and "exp_avg_sq", (r, n) for a left basis or (m, r) for a right one.
        turn: (r, r), newᵀ · old.
        left: which side the basis is on.
        second: whether the second moment is carried, too.
    """
    for key, matrix in (("exp_avg", turn), ("exp_avg_sq", turn.square()))[: 1 + second]:
        moment = tensor(state, key)
        moment.copy_(matrix @ moment if left else moment @ matrix.T)
