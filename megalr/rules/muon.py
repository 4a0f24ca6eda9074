"""Muon: momentum, made orthogonal, https://kellerjordan.github.io/posts/muon/ and arXiv 2502.16982."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from megalr.errors import UserError
from megalr.rules.base import Basis, Rule, Shape, State, tensor
from megalr.rules.scaling import unit

GRAM_ASPECT = 1.5  # from this ratio of the sides on the iteration on the Gram matrix takes fewer operations
GRAM_STEPS = 3  # of it before X is formed again, which keeps rounding small


@dataclass(frozen=True, kw_only=True)
class Muon(Rule):
    """M = μ M + (1-μ) G,  update = c · NS((1-μ) G + μ M), with NS the Newton-Schulz iteration towards U Vᵀ.

    Source: Keller Jordan's post; names and defaults as in ``torch.optim.Muon``. The iteration starts from X / ‖X‖ at
    every scale of the gradient, where published code adds 1e-7 to the norm and so stalls on small gradients.

    Attributes:
        momentum: μ, the decay of the momentum M.
        nesterov: use NS((1-μ) G + μ M). False: use NS(M).
        ns_coefficients: a, b, c of X <- a X + (b X Xᵀ + c (X Xᵀ)²) X.
        ns_steps: Newton-Schulz iterations.
        ns_dtype: data type of the iteration. The original uses bfloat16, which is fast on a GPU.
        adjust_lr_fn: "original" uses c = √max(1, m/n). "match_rms_adamw" uses c = 0.2 √max(m, n): updates then have
            the size of AdamW's, and AdamW's learning rate can be used (arXiv 2502.16982).
    """

    type_name: ClassVar[str] = "Muon"
    name: ClassVar[str] = "muon"
    reset_keys: ClassVar[tuple[str, ...]] = ("momentum_buffer",)
    linear_keys: ClassVar[tuple[str, ...]] = ("momentum_buffer",)

    momentum: float = 0.95
    nesterov: bool = True
    ns_coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315)
    ns_steps: int = 5
    ns_dtype: Literal["float32", "bfloat16"] = "float32"
    adjust_lr_fn: Literal["original", "match_rms_adamw"] = "original"

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise UserError(f"optimizer.params.momentum is {self.momentum}; write a number in [0, 1)")
        if self.ns_steps < 1:
            raise UserError(f"optimizer.params.ns_steps is {self.ns_steps}; write at least 1")

    def init_state(self, shape: Shape, device: torch.device | str = "cpu") -> State:
        return {"momentum_buffer": torch.zeros(shape, device=device)}

    def state_numel(self, shape: Shape) -> int:
        return shape[0] * shape[1]

    def flops(self, shape: Shape) -> float:
        short, long = sorted(shape)
        if not self._iterates_on_gram(shape):
            return self.ns_steps * (4.0 * short * short * long + 2.0 * short**3)
        rounds = -(-self.ns_steps // GRAM_STEPS)
        return rounds * 4.0 * short * short * long + (4 * self.ns_steps - 3 * rounds) * 2.0 * short**3

    def update(self, grad: Tensor, state: State, basis: Basis | None) -> Tensor:
        buffer = tensor(state, "momentum_buffer").lerp_(grad, 1 - self.momentum)
        direction = grad.lerp(buffer, self.momentum) if self.nesterov else buffer
        m, n = grad.shape
        factor = max(1.0, m / n) ** 0.5 if self.adjust_lr_fn == "original" else 0.2 * max(m, n) ** 0.5
        return self._orthogonalized(direction).mul_(factor)

    def _orthogonalized(self, matrix: Tensor) -> Tensor:
        """Singular values moved towards 1: into about [0.7, 1.2], for those above a few thousandths of the norm."""
        x = unit(matrix).to(getattr(torch, self.ns_dtype))
        iterate = _newton_schulz_on_gram if self._iterates_on_gram((x.shape[0], x.shape[1])) else _newton_schulz
        return iterate(x, self.ns_coefficients, self.ns_steps).to(matrix.dtype)

    def _iterates_on_gram(self, shape: Shape) -> bool:
        # In bf16 the Gram matrix's small eigenvalues are rounding, which the iteration blows up.
        return self.ns_dtype == "float32" and max(shape) > GRAM_ASPECT * min(shape)


def _newton_schulz(x: Tensor, coefficients: tuple[float, float, float], steps: int) -> Tensor:
    """X <- a X + (b G + c G²) X with G = X Xᵀ, so many times; for a tall X the same from the right, with G = Xᵀ X."""
    a, b, c = coefficients
    tall = x.shape[0] > x.shape[1]
    for _ in range(steps):
        gram = x.T @ x if tall else x @ x.T
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.addmm(x, x, polynomial, beta=a) if tall else torch.addmm(x, polynomial, x, beta=a)
    return x


def _newton_schulz_on_gram(x: Tensor, coefficients: tuple[float, float, float], steps: int) -> Tensor:
    """The same for X with a short side: its factors, all of them polynomials in G, are multiplied before X is.

    With Z = b G + c G², a step is X <- (a I + Z) X and, since polynomials in G commute, G <- (a I + Z)² G.
    """
    a, b, c = coefficients
    tall = x.shape[0] > x.shape[1]
    while steps:
        count = min(steps, GRAM_STEPS)
        steps -= count
        gram = x.T @ x if tall else x @ x.T
        product: Tensor | None = None
        for step in range(count):
            z = torch.addmm(gram, gram, gram, beta=b, alpha=c)
            if step + 1 < count:
                gram = torch.addmm(gram, z, gram, beta=a)
                gram = torch.addmm(gram, z, gram, beta=a)
            if product is None:
                product = z
                product.diagonal().add_(a)
            else:
                product = torch.addmm(product, z, product, beta=a)
        assert product is not None
        x = x @ product if tall else product @ x
    return x
