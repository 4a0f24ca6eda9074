"""Weight refactorization: the balanced pair with the same product."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megalr.ops import checks
from megalr.ops.library import run

Moments = Literal["keep", "reset", "transport"]

# Why a pair was left as it was, by its status.
REASONS = {
    1: "a factor is not finite, or the balanced one would not be in its dtype",
    2: "the product's rank is below r",
    3: "a moment is not finite, or might not be in the new pair",
    4: "a decomposition did not converge",
}

# Below this multiple of the largest, a singular value of an fp32 product is rounding.
_SMALLEST_RATIO = torch.finfo(torch.float32).eps
# And below this multiple of what the factors' norms would allow, where the product cancels, it is fp64's.
_SMALLEST_OF_FACTORS = 1e-10


@torch.no_grad()
def refactorize_(
    B: Sequence[Tensor],  # noqa: N803
    A: Sequence[Tensor],  # noqa: N803
    moments: Sequence[Tensor] = (),
    mode: Moments = "keep",
) -> Tensor:
    """The balanced pairs with the same products, in place, for many pairs at once: compiled where that can be had.

    What :func:`refactorize` does with one pair; csrc/refactorize.cpp says how the compiled op does it faster, without
    allocating m x n elements, or more than 4 times the largest pair's bytes where m + n is at least 4 r. The host waits
    for a GPU once in a call, and where torch's decompositions read their own error flags.

    Args:
        B: (m, r) each, m >= r, fp32, or bf16, which is computed in fp32 and rounded. Modified in place.
        A: (r, n) each, n >= r, as B. Modified in place.
        moments: with "reset" and "transport" four tensors for each pair: exp_avg_B, exp_avg_sq_B, exp_avg_A,
            exp_avg_sq_A of the first, then of the second, and so on. Modified in place.
        mode: what becomes of the moments: "keep" (give none), "reset" (zeros) or "transport" (as in
            :func:`transport_moments`).

    Returns:
        int64, one number for each pair, on the pairs' device: 0, done; else left as it was with its moments, and the
        number is a key of :data:`REASONS`.

    Raises:
        ValueError: a tensor does not fit; the message says which, and what to write.
    """
    status: Tensor = run("refactorize", B, A, moments, mode)
    return status


@dataclass(frozen=True)
class Refactorized:
    """A balanced pair, and the maps that carry first moments (or gradients) of the old pair to it.

    Attributes:
        B: (m, r) = U √S.
        A: (r, n) = √S Vᵀ, so that B A = U S Vᵀ is the old product and Bᵀ B = A Aᵀ = S.
        map_B: (r, r), fp64; a first moment of the old B, times this from the right, is one of the new B.
        map_A: (r, r), fp64; this times a first moment of the old A is one of the new A.
        S: (r,), fp64; the product's singular values.
    """

    B: Tensor
    A: Tensor
    map_B: Tensor
    map_A: Tensor
    S: Tensor


def refactorize(B: Tensor, A: Tensor) -> Refactorized | None:  # noqa: N803
    """U √S and √S Vᵀ, where U S Vᵀ is the singular value decomposition of B A.

    B = Qb Rb and Aᵀ = Qa Ra are thin QR decompositions and the r x r core is Rb Raᵀ = U' S V'ᵀ, all in fp64, so
    B A = (Qb U') S (Qa V')ᵀ without ever forming the m x n product. In fp32 R would lose the product where B A is much
    smaller than B and A are. Source: arXiv 2505.22922; the cheaper route is ours.

    Since B_new = B M and A_new = M⁻¹ A with M = Raᵀ V' S^(-1/2) = Rb⁻¹ U' √S, gradients, and with them first moments,
    map exactly: dB_new = dB M⁻ᵀ = dB Rbᵀ U' S^(-1/2) and dA_new = Mᵀ dA = S^(-1/2) V'ᵀ Ra dA.

    The sign of a singular vector is an accident of the arithmetic: each takes the one that makes the largest element of
    its column of M positive.

    Args:
        B: (m, r), fp32; m >= r.
        A: (r, n), fp32; n >= r.

    Returns:
        The new pair, fp32; or None, and the pair is to be left as it is, when a factor is not finite or the product
        has numerically a lower rank than r: balancing would make a column of B and the row of A that meets it both
        zero, a point that no gradient leaves.

    Raises:
        torch.linalg.LinAlgError: a decomposition does not converge.
    """
    if not (torch.isfinite(B).all() and torch.isfinite(A).all()):
        return None
    q_b, r_b = torch.linalg.qr(B.double())
    q_a, r_a = torch.linalg.qr(A.T.double())
    u, s, vh = torch.linalg.svd(r_b @ r_a.T)
    factors = (r_b.norm(dim=0) * r_a.norm(dim=0)).norm()
    if not (s[-1] > _SMALLEST_RATIO * s[0] and s[-1] > _SMALLEST_OF_FACTORS * factors):
        return None
    root = s.sqrt()
    map_a = (vh / root[:, None]) @ r_a
    sign = map_a.gather(1, map_a.abs().argmax(1, keepdim=True)).sign()  # (r, 1)
    map_b = r_b.T @ (u / root * sign.T)
    new_b = q_b @ (u * root * sign.T)
    new_a = (sign * root[:, None] * vh) @ q_a.T
    return Refactorized(new_b.to(B), new_a.to(A), map_b, sign * map_a, s)


def transport_moments(new: Refactorized, moments: dict[str, Tensor]) -> dict[str, Tensor]:
    """The factors' Adam moments in the new pair.

    The first moment is linear in the gradients, so its map is exact. The second is not: each new gradient element is a
    combination of a row's (or column's) old ones, and if those were uncorrelated its mean square would be the
    combination with squared coefficients, which is what is used. All in fp64: the maps of badly scaled factors have
    squares that fp32 does not hold.

    Args:
        new: what :func:`refactorize` returned.
        moments: ``exp_avg_B``, ``exp_avg_sq_B`` of shape (m, r) and ``exp_avg_A``, ``exp_avg_sq_A`` of (r, n).
    """
    old = {name: moment.double() for name, moment in moments.items()}
    carried = {
        "exp_avg_B": old["exp_avg_B"] @ new.map_B,
        "exp_avg_sq_B": old["exp_avg_sq_B"] @ new.map_B.square(),
        "exp_avg_A": new.map_A @ old["exp_avg_A"],
        "exp_avg_sq_A": new.map_A.square() @ old["exp_avg_sq_A"],
    }
    return {name: moment.to(moments[name]) for name, moment in carried.items()}


def refactorize_reference(
    B: Sequence[Tensor],  # noqa: N803
    A: Sequence[Tensor],  # noqa: N803
    moments: Sequence[Tensor],
    moment_mode: Moments,
) -> Tensor:
    """The op as torch calls, pair by pair: what runs where nothing is compiled.

    The schema says ``moment_mode``: torch.compile fails on an op with an argument of the name ``mode``.
    """
    status = torch.zeros(len(B), dtype=torch.int64, device=B[0].device if B else "cpu")
    for i, (b, a) in enumerate(zip(B, A, strict=True)):
        status[i] = _refactorize_one(b, a, moments[4 * i : 4 * i + 4], moment_mode)
    return status


def refactorize_fake(
    B: Sequence[Tensor],  # noqa: N803
    A: Sequence[Tensor],  # noqa: N803
    moments: Sequence[Tensor],
    moment_mode: Moments,
) -> Tensor:
    """The checks, which csrc/refactorize.cpp makes too, and a result of the right shape."""
    if moment_mode not in {"keep", "reset", "transport"}:
        _fail(f'mode is "{moment_mode}"; write keep, reset or transport')
    each = 0 if moment_mode == "keep" else 4
    if len(A) != len(B):
        _fail(f"A has {len(A)} tensors and B {len(B)}; give one for each of B")
    if len(moments) != each * len(B):
        names = ": exp_avg_B, exp_avg_sq_B, exp_avg_A, exp_avg_sq_A" if each else ""
        _fail(f"moments has {len(moments)} tensors and B {len(B)}; this mode takes {each} for each of B{names}")
    for i, (b, a) in enumerate(zip(B, A, strict=True)):
        checks.check_tensor("refactorize", f"B[{i}]", b, checks.STORAGE, "B[0]", B[0])
        checks.check_tensor("refactorize", f"A[{i}]", a, checks.STORAGE, "B[0]", B[0])
        shapes = f"B[{i}] has shape {list(b.shape)} and A[{i}] {list(a.shape)}"
        if b.dim() != 2 or a.dim() != 2 or b.shape[1] != a.shape[0]:
            _fail(f"{shapes}; they must be [m, r] and [r, n]")
        most = min(b.shape[0], a.shape[1])
        if b.shape[1] > most:
            _fail(f"{shapes}; their product has at most rank {most}: use a rank up to that")
        for j, factor in enumerate((b, b, a, a)[:each]):
            what, moment = f"moments[{4 * i + j}]", moments[4 * i + j]
            checks.check_tensor("refactorize", what, moment, checks.STORAGE, "B[0]", B[0])
            if moment.shape != factor.shape:
                model = f"{'BBAA'[j]}[{i}] {list(factor.shape)}"
                _fail(f"{what} has shape {list(moment.shape)} and {model}; they must be the same")
    return torch.empty(len(B), dtype=torch.int64, device=B[0].device if B else "cpu")


def _refactorize_one(b: Tensor, a: Tensor, moments: Sequence[Tensor], mode: Moments) -> int:
    if not b.shape[1]:
        return 0
    if not (torch.isfinite(b).all() and torch.isfinite(a).all()):
        return 1
    try:
        new = refactorize(b.float(), a.float())
    except torch.linalg.LinAlgError:
        return 4
    if new is None:
        return 2
    status = _out_of_range(new, b, a, moments if mode == "transport" else ())
    if status:
        return status
    if mode == "transport":
        names = ("exp_avg_B", "exp_avg_sq_B", "exp_avg_A", "exp_avg_sq_A")
        carried = transport_moments(new, dict(zip(names, moments, strict=True)))
        for name, moment in zip(names, moments, strict=True):
            moment.copy_(carried[name])
    elif mode == "reset":
        for moment in moments:
            moment.zero_()
    b.copy_(new.B)
    a.copy_(new.A)
    return 0


def _out_of_range(new: Refactorized, b: Tensor, a: Tensor, moments: Sequence[Tensor]) -> int:
    """1 where the new pair may leave its dtype's range, 3 where a moment may, by bounds; 0 where nothing does."""
    if not new.S[0].sqrt() < min(torch.finfo(b.dtype).max, torch.finfo(a.dtype).max):  # no element is larger
        return 1
    maps = (new.map_B, new.map_B.square(), new.map_A.T, new.map_A.T.square())
    for moment, to in zip(moments, maps, strict=False):
        # No element of the product is larger than this; a NaN is below nothing.
        bound = moment.abs().amax().double() * to.abs().sum(0).amax()
        if not bound < torch.finfo(moment.dtype).max:
            return 3
    return 0


def _fail(message: str) -> None:
    checks.fail("refactorize", message)
