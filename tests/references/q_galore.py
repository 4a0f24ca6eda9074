"""Q-GaLore, arXiv 2407.08296: GaLore whose basis and moments are stored with few bits, and refreshed when needed."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.references.common import Draw
from tests.references.galore import GaLore


class QGaLore(GaLore):
    """P is what 4 bits keep of the singular vectors, m and v what 8 bits keep; the gap grows while P stays."""

    type_name = "QGaLoreAdamW"
    trained_with = {**GaLore.trained_with, "min_8bit_size": 64, "queue_size": 1, "cos_threshold": 0.1}
    short = {"rank": 4, "update_proj_gap": 3, "queue_size": 2, "min_8bit_size": 0}
    # Eight bits of a moment turn over where a sum in another order lies on the other side of a half.
    tensor_parallel_bound = 1e-2
    dtypes = frozenset({torch.float32, torch.uint8})

    @staticmethod
    def papers_floats(m: int, n: int, r: int) -> int | None:
        return None

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        rank: int = 128,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        proj_type: str = "std",
        projector: str = "svd",
        cos_threshold: float = 0.4,
        queue_size: int = 5,
        gamma_proj: float = 2.0,
        min_8bit_size: int = 4096,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        phase: int = 0,
        draw: Draw | None = None,
    ) -> None:
        super().__init__(
            shape,
            rank=rank,
            update_proj_gap=update_proj_gap,
            scale=scale,
            proj_type=proj_type,
            projector=projector,
            betas=betas,
            eps=eps,
            phase=phase,
            draw=draw,
        )
        self.threshold, self.gamma = cos_threshold, gamma_proj
        self.queue_size = queue_size
        self.min_size = min_8bit_size
        self.queue: list[float] = []

    def refresh(self, G: Tensor) -> None:
        old = self.P
        super().refresh(G)
        if old is not None:
            cosine = (old[:, 0] @ self.P[:, 0]) / (old[:, 0].norm() * self.P[:, 0].norm())
            self.queue = [*self.queue, cosine.item()][-self.queue_size :]
            if len(self.queue) == self.queue_size and sum(self.queue) / self.queue_size >= self.threshold:
                self.gap = int(self.gap * self.gamma)
        self.P = four_bits(self.P.T).T

    def left_update(self, G: Tensor) -> Tensor:
        update = super().left_update(G)
        if self.adam.m.numel() >= self.min_size:
            # Moments are laid out as the matrix is, row by row; on the right side G is transposed here.
            right = self.side == "right"
            m, v = (x.T if right else x for x in (self.adam.m, self.adam.v))
            m, v = eight_bits(m, dynamic_codes(signed=True)), eight_bits(v, dynamic_codes(signed=False))
            self.adam.m, self.adam.v = (m.T, v.T) if right else (m, v)
        return update


def four_bits(X: Tensor) -> Tensor:
    """Each run of 256 entries rounded to 16 levels, equally far apart, that reach to zero, which is one of them."""
    rounded = []
    for group in X.reshape(-1).split(256):
        lowest, highest = min(group.min().item(), 0.0), max(group.max().item(), 0.0)
        step = max(highest - lowest, 1e-5) / 15
        zero = min(max(round(-lowest / step), 0), 15)
        levels = ((group / step).round() + zero).clamp(0, 15)
        rounded.append((levels - zero) * step)
    return torch.cat(rounded).view(X.shape)


def eight_bits(X: Tensor, codes: Tensor) -> Tensor:
    """Each run of 256 entries, divided by the largest, rounded to the nearest of 256 codes."""
    codes, rounded = codes.to(X.dtype), []
    for block in X.reshape(-1).split(256):
        largest = block.abs().max()
        scaled = block / largest if largest > 0 else block
        rounded.append(codes[(scaled[:, None] - codes).abs().argmin(dim=1)] * largest)
    return torch.cat(rounded).view(X.shape)


def dynamic_codes(signed: bool) -> Tensor:
    """Dynamic 8-bit codes (arXiv 1511.04561, 2110.02861): 0, 1, and in each decade a fraction with the bits left.

    A code whose first one stands in place k has 10^-k for its exponent; the bits behind it are a linear fraction in
    [0.1, 1]. With a sign one bit less is left.
    """
    codes = [0.0, 1.0]
    for exponent in range(7):
        fractions = 2 ** (6 - exponent) * (1 if signed else 2)
        for j in range(fractions):
            fraction = 0.1 + 0.9 * (j + 0.5) / fractions
            codes += [10.0**-exponent * fraction] + ([-(10.0**-exponent) * fraction] if signed else [])
    assert len(codes) == 256
    return torch.tensor(sorted(codes), dtype=torch.float64)
