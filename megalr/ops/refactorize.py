"""Weight refactorization: the balanced pair with the same product."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Below this multiple of the largest, a singular value of an fp32 product is rounding.
_SMALLEST_RATIO = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Refactorized:
    """A balanced pair, and the maps that carry first moments (or gradients) of the old pair to it.

    Attributes:
        B: (m, r) = U √S.
        A: (r, n) = √S Vᵀ, so that B A = U S Vᵀ is the old product and Bᵀ B = A Aᵀ = S.
        map_B: (r, r); a first moment of the old B, times this from the right, is one of the new B.
        map_A: (r, r); this times a first moment of the old A is one of the new A.
    """

    B: Tensor
    A: Tensor
    map_B: Tensor
    map_A: Tensor


def refactorize(B: Tensor, A: Tensor) -> Refactorized | None:  # noqa: N803
    """U √S and √S Vᵀ, where U S Vᵀ is the singular value decomposition of B A.

    B = Qb Rb and Aᵀ = Qa Ra are thin QR decompositions in fp32, and the r x r core Rb Raᵀ = U' S V'ᵀ is decomposed
    in fp64, so B A = (Qb U') S (Qa V')ᵀ without ever forming the m x n product. Source: arXiv 2505.22922; the
    cheaper route is ours.

    Since B_new = B M and A_new = M⁻¹ A with M = Raᵀ V' S^(-1/2) = Rb⁻¹ U' √S, gradients, and with them first moments,
    map exactly: dB_new = dB M⁻ᵀ = dB Rbᵀ U' S^(-1/2) and dA_new = Mᵀ dA = S^(-1/2) V'ᵀ Ra dA.

    Args:
        B: (m, r), fp32; m >= r.
        A: (r, n), fp32; n >= r.

    Returns:
        The new pair, fp32; or None, and the pair is to be left as it is, when a factor is not finite or the product
        has numerically a lower rank than r: balancing would make a column of B and the row of A that meets it both
        zero, a point that no gradient leaves.
    """
    if not (torch.isfinite(B).all() and torch.isfinite(A).all()):
        return None
    q_b, r_b = torch.linalg.qr(B)
    q_a, r_a = torch.linalg.qr(A.T)
    r_b, r_a = r_b.double(), r_a.double()
    u, s, vh = torch.linalg.svd(r_b @ r_a.T)
    if not s[-1] > _SMALLEST_RATIO * s[0]:
        return None
    root = s.sqrt()
    new_b = q_b.double() @ (u * root)
    new_a = (root[:, None] * vh) @ q_a.T.double()
    map_b = r_b.T @ (u / root)
    map_a = (vh / root[:, None]) @ r_a
    return Refactorized(new_b.to(B), new_a.to(A), map_b.to(B), map_a.to(A))


def transport_moments(new: Refactorized, moments: dict[str, Tensor]) -> dict[str, Tensor]:
    """The factors' Adam moments in the new pair.

    The first moment is linear in the gradients, so its map is exact. The second is not: each new gradient element is a
    combination of a row's (or column's) old ones, and if those were uncorrelated its mean square would be the
    combination with squared coefficients, which is what is used.

    Args:
        new: what :func:`refactorize` returned.
        moments: ``exp_avg_B``, ``exp_avg_sq_B`` of shape (m, r) and ``exp_avg_A``, ``exp_avg_sq_A`` of (r, n).
    """
    return {
        "exp_avg_B": moments["exp_avg_B"] @ new.map_B,
        "exp_avg_sq_B": moments["exp_avg_sq_B"] @ new.map_B.square(),
        "exp_avg_A": new.map_A @ moments["exp_avg_A"],
        "exp_avg_sq_A": new.map_A.square() @ moments["exp_avg_sq_A"],
    }
