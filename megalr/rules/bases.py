"""Orthonormal bases of the leading singular subspace of a gradient, by five roads."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

Side = Literal["left", "right"]
Projector = Literal["svd", "eigh", "randomized", "power", "random"]

OVERSAMPLING = 8  # columns beyond the rank in a randomized range finder (Halko et al., arXiv 0909.4061)
POWER_STEPS = 2  # of the randomized range finder; enough for spectra that decay slowly
SHIFT = 1e-6  # of the Gram matrix's mean eigenvalue, added where a decomposition has failed before


def leading_basis(
    grad: Tensor,
    rank: int,
    side: Side,
    projector: Projector,
    *,
    previous: Tensor | None,
    generator: torch.Generator,
    name: str,
) -> Tensor:
    """An orthonormal basis of the leading rank-r left or right singular subspace, or of a random one.

    - svd: the singular vectors themselves; the reference.
    - eigh: eigenvectors of the smaller Gram matrix. Faster; loses the subspace of singular values below
      3e-4 of the largest.
    - randomized: a random range finder with two power steps, then the SVD of a small matrix.
    - power: one step of subspace iteration from the previous basis, and a QR: two products and no decomposition.
      Without a previous basis it starts with a randomized one.
    - random: a uniformly random orthonormal basis, whatever the gradient.

    A singular vector's sign is an accident of the arithmetic, and moments that are kept through a refresh depend on it:
    each column gets the sign by which it agrees with the previous basis's column.

    A gradient that is not finite gives the previous basis. A decomposition that fails is replaced by a randomized one,
    that by a shifted eigh, and that by the previous basis; each is logged.

    Args:
        grad: (m, n), fp32.
        rank: r, at most min(m, n).
        side: "left" for a basis of columns, "right" for one of rows.
        projector: which road.
        previous: the last basis, (m, r) or (n, r); None before the first.
        generator: of the CPU, for what is random.
        name: the matrix's name, for the log.

    Returns:
        (m, r) or (n, r), fp32, with orthonormal columns.
    """
    matrix = grad if side == "left" else grad.T
    last_resort = "a random basis serves" if previous is None else "the old basis stays"
    if projector == "random":
        return random_basis(matrix.shape[0], rank, generator, matrix.device)
    if not torch.isfinite(matrix).all():
        logger.warning("%s: the gradient is not finite; %s", name, last_resort)
    else:
        roads: dict[str, Callable[[], Tensor]] = {
            "svd": lambda: _svd(grad, rank, side),
            "eigh": lambda: _eigh(matrix, rank),
            "randomized": lambda: _randomized(matrix, rank, generator),
            "power": lambda: _power(matrix, previous) if previous is not None else roads["randomized"](),
            "shifted eigh": lambda: _eigh(matrix, rank, SHIFT),
        }
        for road in dict.fromkeys([projector, "randomized", "shifted eigh"]):
            try:
                basis = roads[road]()
            except torch.linalg.LinAlgError as error:
                logger.warning("%s: %s failed (%s)", name, road, str(error).split("\n")[0])
                continue
            if torch.isfinite(basis).all():
                return _signed(basis, previous).contiguous()
            logger.warning("%s: %s gave a basis that is not finite", name, road)
        logger.warning("%s: every decomposition failed; %s", name, last_resort)
    if previous is not None:
        return previous.clone()
    return random_basis(matrix.shape[0], rank, generator, matrix.device)


class SummedMatrix:
    """A matrix that is the sum of parts held by several ranks, and is never formed: its products are added up."""

    def __init__(self, part: Tensor, add_up: Callable[[Tensor], Tensor]) -> None:
        """
        Args:
            part: this rank's, of the whole matrix's shape.
            add_up: the sum over the ranks, in place.
        """
        self._part, self._add_up = part, add_up
        self.shape, self.device = part.shape, part.device

    @property
    def T(self) -> SummedMatrix:  # noqa: N802  (as in torch)
        """The transpose."""
        return SummedMatrix(self._part.T, self._add_up)

    def __matmul__(self, other: Tensor) -> Tensor:
        return self._add_up(self._part @ other)


def sketched_basis(
    grad: SummedMatrix,
    rank: int,
    side: Side,
    projector: Projector,
    *,
    previous: Tensor | None,
    product: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """:func:`leading_basis` of a finite gradient by "power" or "randomized", from products with thin matrices alone.

    Args:
        grad, rank, side, projector, previous, generator: see there.
        product: G P or Gᵀ P of the previous basis P, (m, r) or (n, r), which the first half of a power step needs;
            not looked at without a previous basis.
    """
    matrix = grad if side == "left" else grad.T
    if projector == "power" and previous is not None:
        # A zero gradient has no subspace of its own.
        new = _second_half(matrix, product) if product.any() else previous.clone()
        return _signed(new, previous).contiguous()
    return _signed(_randomized(matrix, rank, generator), previous).contiguous()


def random_basis(size: int, rank: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """(size, rank): uniformly random among orthonormal bases, the same on every device."""
    return orthonormal(torch.randn(size, rank, generator=generator)).contiguous().to(device)


def orthonormal(matrix: Tensor) -> Tensor:
    """Q of the QR decomposition whose R has a positive diagonal, which makes it unique and continuous."""
    q, r = torch.linalg.qr(matrix)
    signs = torch.where(r.diagonal() < 0, -1.0, 1.0)
    return q * signs


def power_step(matrix: Tensor | SummedMatrix, previous: Tensor) -> Tensor:
    """Q of M Mᵀ P with P = ``previous``: one step of subspace iteration.

    The inner factor is made orthonormal, too. That changes nothing in exact arithmetic, since triangular factors from
    the right leave Q as it is, and keeps singular values that are squared otherwise.
    """
    return _second_half(matrix, matrix.T @ previous)


def _second_half(matrix: Tensor | SummedMatrix, product: Tensor) -> Tensor:
    """A power step from Mᵀ P on."""
    return orthonormal(matrix @ orthonormal(product))


def _signed(basis: Tensor, previous: Tensor | None) -> Tensor:
    """The columns with the sign by which they agree with the previous ones; at first, with a positive largest entry."""
    largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))[0]
    towards = largest if previous is None else (basis * previous).sum(0)
    return basis * torch.where(towards < 0, -1.0, 1.0)


def _svd(grad: Tensor, rank: int, side: Side) -> Tensor:
    # Of the gradient as it stands, on either side, so that left and right vectors come from one decomposition.
    u, _, vh = torch.linalg.svd(grad, full_matrices=False)
    return u[:, :rank] if side == "left" else vh[:rank].T


def _power(matrix: Tensor, previous: Tensor) -> Tensor:
    # A zero gradient has no subspace of its own.
    return power_step(matrix, previous) if matrix.any() else previous.clone()


def _randomized(matrix: Tensor | SummedMatrix, rank: int, generator: torch.Generator) -> Tensor:
    width = min(rank + OVERSAMPLING, *matrix.shape)
    probe = torch.randn(matrix.shape[1], width, generator=generator).to(matrix.device)
    basis = orthonormal(matrix @ probe)
    for _ in range(POWER_STEPS):
        basis = power_step(matrix, basis)
    inner = torch.linalg.svd((matrix.T @ basis).T, full_matrices=False)[0]
    return basis @ inner[:, :rank]


def _eigh(matrix: Tensor, rank: int, shift: float = 0.0) -> Tensor:
    """Left singular vectors from the eigenvectors of the smaller Gram matrix."""
    scale = matrix.abs().max()
    scaled = matrix / torch.where(scale > 0, scale, 1.0)  # its squares then neither overflow nor vanish
    wide = matrix.shape[0] <= matrix.shape[1]
    gram = scaled @ scaled.T if wide else scaled.T @ scaled
    if shift:
        gram.diagonal().add_(shift * gram.diagonal().mean() + torch.finfo(gram.dtype).tiny)
    vectors = torch.linalg.eigh(gram)[1].flip(1)[:, :rank]  # eigenvalues come in ascending order
    return vectors if wide else orthonormal(scaled @ vectors)
