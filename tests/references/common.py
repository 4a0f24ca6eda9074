"""What the references share: facts for tests, the step, Adam written out, and the side and schedule of a projection."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

# "optimizer.params" of runs that train the matrices of the odd model.
MATRICES = {
    "target_modules": ["mlp"],
    "lr": 1e-2,
    "weight_decay": 0.1,
    "adamw": {"lr": 3e-3},
    "embedding": {"lr": 1e-2},
}

# (refreshes made so far, "left" or "right", rows, columns) -> a matrix of independent standard normal numbers.
Draw = Callable[[int, str, int, int], Tensor]


class Reference(ABC):
    """The update of one matrix W; all state is in plain attributes of the gradient's dtype.

    Attributes:
        type_name: what the JSON's "optimizer": {"type": ...} calls the rule; empty for what is no rule of its own.
        trained_with: the JSON's "optimizer.params" in tests that train the odd model: each basis is refreshed, and
            everything else that the rule does now and then is done, at least twice in twelve updates.
        options: by title, parameters beside those that make another method; a derived rule has its own.
        short: hyper-parameters with which the same happens in 25 updates of one matrix.
        on_factors: settings for low-rank factors, of a rule that may train them. In twenty updates the rule does once
            what it does now and then, apart from the optimizer's own resets after 7, 9, 14 and 18.
        tensor_parallel_bound: of the relative error where tensor-parallel ranks share the forward pass.
        dtypes: of the rule's state.
        rests: whether there are updates in which the rule leaves a matrix alone.
        permutation_key: key of the rule's random permutations; empty: the matrix's name.
    """

    type_name: ClassVar[str] = ""
    trained_with: ClassVar[Mapping[str, Any]] = MATRICES
    options: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    short: ClassVar[Mapping[str, Any]] = {}
    on_factors: ClassVar[Mapping[str, Any] | None] = None
    tensor_parallel_bound: ClassVar[float] = 1e-4
    dtypes: ClassVar[frozenset[torch.dtype]] = frozenset({torch.float32})
    rests: ClassVar[bool] = False
    permutation_key: ClassVar[str] = ""

    @staticmethod
    def papers_floats(m: int, n: int, r: int) -> int | None:
        """Numbers that the state of an m x n matrix with m <= n has by the paper; None where it counts otherwise."""
        return None

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

    trained_with = {**MATRICES, "rank": 5, "update_proj_gap": 5}
    short = {"rank": 4, "update_proj_gap": 6}

    @staticmethod
    def papers_floats(m: int, n: int, r: int) -> int | None:
        return m * r + 2 * n * r

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
