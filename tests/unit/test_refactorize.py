"""Refactorization of one pair: same product, balanced factors, moments carried, bad pairs left alone."""

import pytest
import torch
from torch import nn

import megalr
from megalr.ops import refactorize, transport_moments

MOMENTS = ("exp_avg", "exp_avg_sq")
SHAPES = [(24, 16, 4), (16, 24, 16), (7, 5, 5), (33, 20, 1), (1, 9, 1), (64, 64, 32)]


def pair(m, n, r, seed=0, condition=1.0):
    generator = torch.Generator().manual_seed(seed)
    b = torch.randn(m, r, generator=generator) * torch.logspace(0, -torch.tensor(condition).log10().item(), r)
    return b, torch.randn(r, n, generator=generator)


def relative(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(("m", "n", "r"), SHAPES)
@pytest.mark.parametrize("condition", [1.0, 1e4])
def test_same_product_and_balanced(m, n, r, condition):
    b, a = pair(m, n, r, condition=condition)
    new = refactorize(b, a)
    assert new.B.shape == b.shape and new.A.shape == a.shape
    assert relative(new.B @ new.A, b @ a) < 2e-6
    assert relative(new.B.T @ new.B, new.A @ new.A.T) < 1e-5


def test_equals_the_decomposition_of_the_product():
    b, a = pair(24, 16, 4)
    _, s, _ = torch.linalg.svd(b.double() @ a.double())
    new = refactorize(b, a)
    torch.testing.assert_close(new.B.T @ new.B, torch.diag(s[:4]).float(), rtol=1e-5, atol=1e-5)


def test_maps_carry_gradients_exactly():
    """dL/dB_new and dL/dA_new of L(B A) follow from the old gradients by the maps."""
    b, a = pair(12, 9, 3)
    target = torch.randn(12, 9, generator=torch.Generator().manual_seed(5))

    def gradients(b, a):
        b, a = b.clone().requires_grad_(), a.clone().requires_grad_()
        ((b @ a - target) ** 2).sum().backward()
        return b.grad, a.grad

    new = refactorize(b, a)
    old_db, old_da = gradients(b, a)
    new_db, new_da = gradients(new.B, new.A)
    carried = transport_moments(
        new,
        {"exp_avg_B": old_db, "exp_avg_A": old_da, "exp_avg_sq_B": old_db**2, "exp_avg_sq_A": old_da**2},
    )
    assert relative(carried["exp_avg_B"], new_db) < 1e-5
    assert relative(carried["exp_avg_A"], new_da) < 1e-5
    assert (carried["exp_avg_sq_B"] >= 0).all() and (carried["exp_avg_sq_A"] >= 0).all()


def test_second_moment_of_uncorrelated_gradients_is_carried_in_expectation():
    b, a = pair(6, 5, 3)
    new = refactorize(b, a)
    scale = torch.tensor([0.5, 1.0, 3.0])
    draws = (torch.randn(200_000, 3, generator=torch.Generator().manual_seed(1)) * scale).double()
    squares = {"exp_avg_sq_B": scale.square().expand(6, 3), "exp_avg_sq_A": scale.square()[:, None].expand(3, 5)}
    carried = transport_moments(new, {"exp_avg_B": b, "exp_avg_A": a, **squares})
    for row in carried["exp_avg_sq_B"].double():
        torch.testing.assert_close(row, (draws @ new.map_B).square().mean(0), rtol=0.03, atol=0)
    for column in carried["exp_avg_sq_A"].T.double():
        torch.testing.assert_close(column, (draws @ new.map_A.T).square().mean(0), rtol=0.03, atol=0)


def after_two_updates(interval):
    """Factors and moments of a layer by name, with a refactorization every so many updates."""
    torch.manual_seed(0)
    config = {
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "megalr": {
            "parametrization": {"type": "low_rank", "rank": 3, "target_modules": ["0"]},
            "refactorization": {"interval": interval, "moments": "transport"},
        },
    }
    model = nn.Sequential(nn.Linear(9, 7, bias=False))
    megalr.parametrize(model, config)
    optimizer = megalr.build_optimizer(model, config)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(32, 9)).sub(1).square().sum().backward()
        optimizer.step()
    layer = model[0]
    found = {"B": layer.B.detach(), "A": layer.A.detach()}
    return found | {f"{key}_{n}": optimizer.state[getattr(layer, n)][key] for key in MOMENTS for n in ("B", "A")}


def test_the_optimizer_carries_each_moment_by_its_own_map():
    before, after = after_two_updates(3), after_two_updates(2)
    new = refactorize(before["B"], before["A"])
    expected = transport_moments(new, {name: value for name, value in before.items() if len(name) > 1})
    for name, value in {"B": new.B, "A": new.A, **expected}.items():
        # A pair of singular vectors has no sign of its own.
        torch.testing.assert_close(after[name].abs(), value.abs(), rtol=1e-3, atol=1e-6)
    assert all((after[f"exp_avg_sq_{n}"] >= 0).all() and (after[f"exp_avg_{n}"] < 0).any() for n in ("B", "A"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite_is_left_alone(bad):
    b, a = pair(8, 8, 3)
    b[2, 1] = bad
    assert refactorize(b, a) is None
    b, a = pair(8, 8, 3)
    a[1, 2] = bad
    assert refactorize(b, a) is None


def test_lower_rank_is_left_alone():
    b, a = pair(8, 8, 3)
    assert refactorize(torch.zeros_like(b), a) is None
    b[:, 2] = b[:, 1]
    assert refactorize(b, a) is None
