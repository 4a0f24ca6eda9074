"""LDAdam, arXiv 2410.16103, algorithm 1."""

from __future__ import annotations

from torch import Tensor

from tests.references.common import MATRICES, Adam, Projected, leading_singular_vectors, orthonormal


class LDAdam(Projected):
    """A basis that one step of block power iteration turns at every update, moments that follow it, and an error E."""

    type_name = "LDAdamW"
    trained_with = {**MATRICES, "rank": 5, "lr": 3e-3}
    options = {"no error feedback": {"error_feedback": False}}
    short = {"rank": 4}

    @staticmethod
    def papers_floats(m: int, n: int, r: int) -> int | None:
        return m * r + 2 * n * r + m * n  # the error is kept, too

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        rank: int = 16,
        rho: float = 0.908,
        proj_type: str = "std",
        betas: tuple[float, float] = (0.908, 0.99),
        eps: float = 1e-8,
        error_feedback: bool = True,
    ) -> None:
        super().__init__(shape, rank=rank, proj_type=proj_type, update_proj_gap=1, phase=0, draw=None)
        if shape[0] == shape[1] and proj_type in ("std", "reverse_std"):
            self.side = "left"
        self.rho = rho
        self.error_feedback = error_feedback
        self.adam = Adam(betas, eps)
        self.E: Tensor | float = 0.0

    def left_update(self, G: Tensor) -> Tensor:
        A = G + self.E
        b1, b2, t = self.adam.beta1, self.adam.beta2, self.adam.t
        if t == 0:
            P = leading_singular_vectors(G, self.rank)
            lost = 0.0
        else:
            m, v = self.adam.m, self.adam.v
            m_hat, v_hat = m / (1 - b1**t), v / (1 - b2**t)
            B = self.rho * self.P @ m_hat + (1 - self.rho) * A
            P = orthonormal(B @ B.T @ self.P)
            C = P.T @ self.P
            self.adam.m = C @ m
            self.adam.v = (1 - b2**t) * (C**2 @ (v_hat - m_hat**2) + (C @ m_hat) ** 2).abs()
            lost = self.P @ m - P @ C @ m
        R = P.T @ A
        N = self.adam.direction(R)
        if self.error_feedback:
            self.E = A - P @ R + b1 / (1 - b1) * lost
        self.P = P
        return P @ N
