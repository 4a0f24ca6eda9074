"""The bases of every projector: orthonormal, of the leading subspace, continuous, and there whatever fails."""

import itertools
import logging

import pytest
import torch

from megalr.rules import bases
from megalr.rules.bases import SummedMatrix, leading_basis, orthonormal, power_step, random_basis, sketched_basis
from megalr.seeding import generator

PROJECTORS = ["svd", "eigh", "randomized", "power", "random"]
SHAPES = [(24, 40), (40, 24), (32, 32), (1, 9), (9, 1), (5, 17)]
NAME = "layers.0.attn.weight"


def matrix(shape, *, decay=0.8, rank=None, seed=0):
    """A matrix with singular values 1, decay, decay², ...; ``rank`` of them."""
    size = min(shape)
    drawing = torch.Generator().manual_seed(seed)
    left, right = (
        torch.linalg.qr(torch.randn(rows, size, generator=drawing, dtype=torch.float64))[0] for rows in shape
    )
    spectrum = decay ** torch.arange(size, dtype=torch.float64)
    spectrum[rank if rank is not None else size :] = 0
    return ((left * spectrum) @ right.T).float()


def basis_of(grad, rank, side, projector, previous=None, seed=0):
    return leading_basis(
        grad, rank, side, projector, previous=previous, generator=generator(seed, NAME, side, 0), name=NAME
    )


def exact_basis(grad, rank, side):
    u, _, vh = torch.linalg.svd(grad.double(), full_matrices=False)
    return u[:, :rank] if side == "left" else vh[:rank].T


def sine(basis, other):
    """The sine of the largest angle between two subspaces: the part of one outside the other."""
    basis, other = basis.double(), other.double()
    return torch.linalg.matrix_norm(basis - other @ (other.T @ basis), ord=2).item()


def assert_orthonormal(basis, shape, rank, side):
    assert basis.shape == (shape[0] if side == "left" else shape[1], rank)
    assert basis.dtype == torch.float32 and basis.is_contiguous()
    assert torch.isfinite(basis).all()
    torch.testing.assert_close(basis.T @ basis, torch.eye(rank), rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("projector", PROJECTORS)
def test_orthonormal(projector, side):
    for shape in SHAPES:
        rank = min(4, *shape)
        first = basis_of(matrix(shape), rank, side, projector)
        assert_orthonormal(first, shape, rank, side)
        again = basis_of(matrix(shape, seed=1), rank, side, projector, previous=first, seed=1)
        assert_orthonormal(again, shape, rank, side)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("projector", "bound"),
    [
        ("svd", 1e-5),  # rounding over the gap between the last singular value kept and the next
        ("eigh", 1e-4),  # the same of squared singular values
        ("randomized", 0.05),  # two power steps leave about (σ_{r+9} / σ_r)⁵
    ],
)
def test_spans_the_leading_subspace(projector, bound, side):
    for shape in SHAPES:
        rank = min(4, *shape)
        assert sine(basis_of(matrix(shape), rank, side, projector), exact_basis(matrix(shape), rank, side)) < bound


def test_left_and_right_singular_vectors_are_a_pair():
    """Uᵀ G V is diagonal, up to the signs, which each side chooses for itself."""
    for shape in SHAPES:
        grad, rank = matrix(shape), min(4, *shape)
        core = basis_of(grad, rank, "left", "svd").T @ grad @ basis_of(grad, rank, "right", "svd")
        torch.testing.assert_close(core.abs(), torch.diag(0.8 ** torch.arange(rank)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
def test_subspace_iteration_converges_at_the_rate_of_its_spectrum(shape, side):
    """The angle's tangent falls by (σ_{r+1} / σ_r)² a step, here 0.64, from a random start down to rounding."""
    grad, rank = matrix(shape), 4
    exact = exact_basis(grad, rank, side)
    basis = basis_of(grad, rank, side, "random")
    sines = []
    for _ in range(80):
        basis = basis_of(grad, rank, side, "power", previous=basis)
        sines.append(sine(basis, exact))
    assert sines[-1] < 1e-5
    assert sines[20] / sines[10] == pytest.approx(0.64**10, rel=0.5)  # the rate holds in the end; 0.7**10 is out


def test_subspace_iteration_starts_with_a_randomized_basis():
    grad = matrix((24, 40))
    assert torch.equal(basis_of(grad, 4, "left", "power"), basis_of(grad, 4, "left", "randomized"))


def test_power_step_equals_orthonormalized_product():
    grad, previous = matrix((24, 40)).double(), basis_of(matrix((24, 40), seed=1), 4, "left", "svd").double()
    torch.testing.assert_close(power_step(grad, previous), orthonormal(grad @ grad.T @ previous))


def test_power_step_keeps_small_singular_values():
    """Values of 1e-5 of the largest lie below rounding once they are squared; a QR in between keeps them apart."""
    grad = matrix((24, 40), decay=0.02)  # 1, 2e-2, 4e-4, 8e-6, ...
    exact = exact_basis(grad, 4, "left")
    basis = orthonormal(exact + 1e-3 * torch.randn(24, 4, generator=generator(0), dtype=torch.float64)).float()
    for _ in range(3):
        basis = power_step(grad, basis)
    assert sine(basis, exact) < 0.02


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("projector", ["power", "randomized"])
def test_continuous(projector, side):
    """A gradient changed by 1e-6 moves the basis itself, not only its span, by as little: no sign and no order flips.

    Two gradients that differ by the rounding of another order of summation then give moments that mean the same.
    """
    previous = basis_of(matrix((24, 40), seed=1), 4, side, "svd")
    for seed in range(10):
        grad = matrix((24, 40), seed=seed)
        noise = torch.randn(24, 40, generator=generator(seed, "noise"))
        moved = grad + 1e-6 * grad.norm() * noise / noise.norm()
        before, after = (basis_of(g, 4, side, projector, previous=previous) for g in (grad, moved))
        assert (before - after).norm() < 1e-4


def test_random_bases_are_those_of_their_generator_alone():
    zero = torch.zeros(24, 40)
    for side in ("left", "right"):
        basis = basis_of(matrix((24, 40)), 4, side, "random")
        assert torch.equal(basis, basis_of(zero, 4, side, "random"))
        assert torch.equal(basis, basis_of(zero * float("nan"), 4, side, "random", previous=basis * 0))
        assert sine(basis, basis_of(zero, 4, side, "random", seed=1)) > 0.5


def test_random_bases_are_uniform():
    """Every direction is in a basis of rank r of n with mean square r / n, whichever it is."""
    projections = torch.stack([basis_of(torch.zeros(8, 8), 2, "left", "random", seed=s) for s in range(4000)])
    squares = (projections @ projections.mT).mean(0)
    torch.testing.assert_close(squares, torch.eye(8) * 2 / 8, rtol=0, atol=0.02)
    assert projections.mean(0).abs().max() < 0.03  # and no sign is preferred


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("projector", PROJECTORS)
def test_rank_deficient_and_zero_gradients(projector, side, caplog):
    grads = [matrix((24, 40), rank=2), matrix((40, 24), rank=2), torch.zeros(24, 40), torch.ones(24, 40)]
    grads += [matrix((24, 40)) * 1e-30, matrix((24, 40)) * 1e30]
    for grad in grads:
        first = basis_of(grad, 4, side, projector)
        assert_orthonormal(first, grad.shape, 4, side)
        again = basis_of(grad, 4, side, projector, previous=first)
        assert_orthonormal(again, grad.shape, 4, side)
        if projector != "random" and grad.abs().max() > 0 and torch.linalg.matrix_rank(grad) == 2:
            assert sine(exact_basis(grad, 2, side), again) < 1e-5
    assert not caplog.records


def test_a_zero_gradient_leaves_the_basis_of_subspace_iteration():
    previous = basis_of(matrix((24, 40)), 4, "left", "svd")
    basis = basis_of(torch.zeros(24, 40), 4, "left", "power", previous=previous)
    assert torch.equal(basis, previous) and basis.data_ptr() != previous.data_ptr()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("projector", [p for p in PROJECTORS if p != "random"])
def test_a_gradient_that_is_not_finite_keeps_the_old_basis(projector, bad, caplog):
    previous = basis_of(matrix((24, 40)), 4, "left", "svd")
    grad = matrix((24, 40), seed=1)
    grad[3, 5] = bad
    basis = basis_of(grad, 4, "left", projector, previous=previous)
    assert torch.equal(basis, previous) and basis.data_ptr() != previous.data_ptr()
    assert [r.getMessage() for r in caplog.records] == [f"{NAME}: the gradient is not finite; the old basis stays"]
    assert_orthonormal(basis_of(grad, 4, "left", projector), (24, 40), 4, "left")  # a random one where there is none


def failing(*_, **__):
    raise torch.linalg.LinAlgError("did not converge\nmore about it")


def messages(caplog):
    for record in caplog.records:
        assert record.levelno == logging.WARNING and record.getMessage().startswith(f"{NAME}: ")
    return [record.getMessage().removeprefix(f"{NAME}: ") for record in caplog.records]


def test_a_failed_svd_is_replaced_by_a_randomized_basis(monkeypatch, caplog):
    """Only the full decomposition fails: the randomized one takes the SVD of a small matrix itself."""
    svd = torch.linalg.svd

    def failing_if_large(matrix, **options):
        return svd(matrix, **options) if matrix.shape[0] <= 4 + bases.OVERSAMPLING else failing()

    grad = matrix((24, 40))
    expected = basis_of(grad, 4, "left", "randomized")
    monkeypatch.setattr(torch.linalg, "svd", failing_if_large)
    assert torch.equal(basis_of(grad, 4, "left", "svd"), expected)
    assert messages(caplog) == ["svd failed (did not converge)"]


def test_a_failed_randomized_basis_is_replaced_by_a_shifted_eigh(monkeypatch, caplog):
    grad = matrix((24, 40))
    monkeypatch.setattr(torch.linalg, "svd", failing)
    basis = basis_of(grad, 4, "left", "svd")
    assert messages(caplog) == ["svd failed (did not converge)", "randomized failed (did not converge)"]
    monkeypatch.undo()
    assert sine(basis, exact_basis(grad, 4, "left")) < 1e-4


def test_a_basis_that_is_not_finite_counts_as_failed(monkeypatch, caplog):
    monkeypatch.setattr(torch.linalg, "svd", lambda m, **_: (torch.full_like(m, torch.nan), None, None))
    assert_orthonormal(basis_of(matrix((24, 40)), 4, "left", "svd"), (24, 40), 4, "left")
    assert messages(caplog)[0] == "svd gave a basis that is not finite"


@pytest.mark.parametrize("projector", ["svd", "eigh", "randomized", "power"])
def test_where_everything_fails_the_old_basis_stays(monkeypatch, caplog, projector):
    """For subspace iteration the QR has to fail."""
    previous = basis_of(matrix((24, 40), seed=1), 4, "left", "svd")
    grad = matrix((24, 40))
    for name in ("qr", "eigh") if projector == "power" else ("svd", "eigh"):
        monkeypatch.setattr(torch.linalg, name, failing)
    basis = basis_of(grad, 4, "left", projector, previous=previous)
    assert torch.equal(basis, previous) and basis.data_ptr() != previous.data_ptr()
    roads = dict.fromkeys([projector, "randomized", "shifted eigh"])
    expected = [f"{road} failed (did not converge)" for road in roads]
    assert messages(caplog) == [*expected, "every decomposition failed; the old basis stays"]


def test_where_everything_fails_the_first_basis_is_random(monkeypatch):
    for name in ("svd", "eigh"):
        monkeypatch.setattr(torch.linalg, name, failing)
    for shape, side in itertools.product(SHAPES[:2], ("left", "right")):
        basis = basis_of(matrix(shape), 4, side, "svd")
        assert_orthonormal(basis, shape, 4, side)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("projector", ["power", "randomized"])
def test_a_sum_of_parts_has_the_basis_of_the_sum(projector, side):
    """Two halves, added up wherever a product is; the sum itself is never formed."""
    parts = [torch.randn(12, 20, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    size, rank = (12 if side == "left" else 20), 4
    previous = random_basis(size, rank, torch.Generator().manual_seed(2), torch.device("cpu"))
    settings = {"previous": previous, "generator": torch.Generator().manual_seed(3)}
    expected = leading_basis(parts[0] + parts[1], rank, side, projector, name="w", **settings)
    settings["generator"] = torch.Generator().manual_seed(3)
    whole = parts[0] + parts[1]
    product = (whole.T if side == "left" else whole) @ previous
    got = sketched_basis(_TwoParts(parts), rank, side, projector, product=product, **settings)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_a_sum_that_is_zero_keeps_its_basis():
    previous = random_basis(20, 4, torch.Generator().manual_seed(2), torch.device("cpu"))
    zero = _TwoParts([torch.zeros(12, 20)] * 2)
    product, random = torch.zeros(12, 4), torch.Generator()
    basis = sketched_basis(zero, 4, "right", "power", previous=previous, product=product, generator=random)
    torch.testing.assert_close(basis, previous)


class _TwoParts(SummedMatrix):
    """Both ranks of a sum in one process."""

    def __init__(self, parts):
        super().__init__(parts[0], lambda t: t)
        self.parts = parts

    @property
    def T(self):  # noqa: N802
        return _TwoParts([part.T for part in self.parts])

    def __matmul__(self, other):
        return sum(part @ other for part in self.parts)
