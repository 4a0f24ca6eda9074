"""What the references share: the step, Adam's direction written out, and the side and schedule of a projection."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

# (refreshes made so far, "left" or "right", rows, columns) -> a matrix of independent standard normal numbers.
Draw = Callable[[int, str, int, int], Tensor]


class Reference(ABC):
    """The update of one matrix W; all state is in plain attributes of the gradient's dtype."""

    @abstractmethod
    def update(self, G: Tensor) -> Tensor:
        """What the learning rate multiplies; ``G`` is left as it is."""

    @torch.no_grad()
    def step(self, W: Tensor, G: Tensor, lr: float, weight_decay: float = 0.0) -> None:
        """W <- W - lr (update + weight_decay W), in place."""
        W -= lr * (self.update(G) + weight_decay * W)


class Adam:
    """Adam's moments and its direction m̂ / (√v̂ + ε), arXiv 1412.6980, algorithm 1."""

    def __init__(self, betas: tuple[float, float], eps: float) -> None:
        self.beta1, self.beta2 = betas
        self.eps = eps
        self.reset()

    def reset(self) -> None:
        self.t = 0
        self.m: Tensor | float = 0.0
        self.v: Tensor | float = 0.0

    def direction(self, g: Tensor) -> Tensor:
        self.t += 1
        self.m = self.beta1 * self.m + (1 - self.beta1) * g
        self.v = self.beta2 * self.v + (1 - self.beta2) * g**2
        m_hat = self.m / (1 - self.beta1**self.t)
        v_hat = self.v / (1 - self.beta2**self.t)
        return m_hat / (v_hat.sqrt() + self.eps)


class Projected(Reference):
    """A rule with one basis P of the columns of G, (m, r), written for the left side alone.

    On the right side it is the same rule for Wᵀ and Gᵀ.
    """

    def __init__(
        self, shape: tuple[int, int], *, rank: int, proj_type: str, update_proj_gap: int, phase: int, draw: Draw | None
    ) -> None:
        m, n = shape
        self.rank = min(rank, m, n)
        self.full = proj_type == "full"
        # "std" shortens the shorter side; a square matrix counts as tall.
        self.side = {
            "std": "right" if m >= n else "left",
            "reverse_std": "left" if m >= n else "right",
            "left": "left",
            "right": "right",
            "full": "left",
        }[proj_type]
        self.gap = update_proj_gap
        self.phase = phase
        self.draw = draw
        self.updates = 0  # made so far
        self.refreshes = 0
        self.P: Tensor | None = None

    def refresh_due(self, step: int) -> bool:
        """Whether the update after ``step`` others needs a new basis."""
        return self.refreshes == 0 or step % self.gap == self.phase

    @abstractmethod
    def left_update(self, G: Tensor) -> Tensor:
        """The update with P on the left."""

    def update(self, G: Tensor) -> Tensor:
        update = self.left_update(G.T).T if self.side == "right" else self.left_update(G)
        self.updates += 1
        return update

    def gaussian(self, side: str, like: Tensor) -> Tensor:
        """The random matrix of this refresh, (m, r) for G = ``like``, (m, n)."""
        assert self.draw is not None, "this reference needs draw=, which gives its random matrices"
        return self.draw(self.refreshes, side, like.shape[0], self.rank).to(like.dtype)


def leading_singular_vectors(G: Tensor, rank: int, previous: Tensor | None = None) -> Tensor:
    """The first ``rank`` left singular vectors of G, (m, r).

    Each has the sign by which it agrees with the previous one; at first, that which makes its largest entry positive.
    """
    U = torch.linalg.svd(G, full_matrices=False)[0][:, :rank]
    for j, u in enumerate(U.T):
        agreement = u[u.abs().argmax()] if previous is None else u @ previous[:, j]
        if agreement < 0:
            u.neg_()
    return U


def orthonormal(A: Tensor) -> Tensor:
    """Q of A = Q R with a positive diagonal of R, (m, r): the one that Gram-Schmidt gives."""
    Q, R = torch.linalg.qr(A)
    return Q * torch.where(R.diagonal() < 0, -1.0, 1.0).to(A.dtype)


class NormGrowthLimiter:
    """Fira's limiter, arXiv 2410.01623, equation 9: ‖S_t‖ is at most γ ‖S_{t-1}‖."""

    def __init__(self, gamma: float = 1.01) -> None:
        self.gamma = gamma
        self.last: Tensor | float = 0.0

    def __call__(self, S: Tensor) -> Tensor:
        if self.last > 0 and S.norm() > self.gamma * self.last:
            S = S * (self.gamma * self.last / S.norm())
        self.last = S.norm()
        return S
