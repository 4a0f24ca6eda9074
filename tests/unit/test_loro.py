"""LORO: the exact step against whole matrices, how the factors start, and what cannot be combined."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from megalr.config.settings import MegalrConfig
from megalr.errors import UserError
from megalr.layers import LowRankLinear, densify, parametrize
from megalr.layers.loro import LoroConfig
from megalr.optim.events.loro import exact_step

SHAPES = [(12, 9, 3), (9, 12, 4), (7, 7, 3), (10, 5, 5), (30, 8, 1), (6, 6, 4)]


def problem(m, n, r, seed=0):
    """B, A and the gradient G of W."""
    torch.manual_seed(seed)
    return torch.randn(m, r), torch.randn(r, n), torch.randn(m, n)


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_retraction_of_the_projected_gradient(shape):
    b, a, grad = problem(*shape)
    new_b, new_a = exact_step(b, a, grad @ a.T, b.T @ grad, lr=0.1)
    U, V = torch.linalg.qr(b.double())[0], torch.linalg.qr(a.T.double())[0]
    left, right, G = U @ U.T, V @ V.T, grad.double()
    tangent = left @ G + G @ right - left @ G @ right
    P, S, Qh = torch.linalg.svd((b @ a).double() - 0.1 * tangent)
    r = shape[2]
    expected = (P[:, :r] * S[:r]) @ Qh[:r]
    torch.testing.assert_close((new_b @ new_a).double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(new_b.T @ new_b, new_a @ new_a.T, atol=1e-4, rtol=1e-4)


def test_to_first_order_it_does_not_depend_on_the_split():
    b, a, grad = problem(12, 9, 3)
    turn = torch.randn(3, 3)
    other_b, other_a = b @ turn, torch.linalg.solve(turn, a)
    one = exact_step(b, a, grad @ a.T, b.T @ grad, lr=0.05)
    two = exact_step(other_b, other_a, grad @ other_a.T, other_b.T @ grad, lr=0.05)
    torch.testing.assert_close(one[0] @ one[1], two[0] @ two[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("broken", ["rank", "nan"])
def test_what_cannot_be_decomposed_is_left_alone(broken):
    b, a, grad = problem(12, 9, 3)
    if broken == "rank":
        b[:, 1] = 0
    else:
        grad[0, 0] = float("nan")
    assert exact_step(b, a, grad @ a.T, b.T @ grad, lr=0.1) is None


def test_start_and_export():
    torch.manual_seed(0)
    model = nn.ModuleDict({"attn": nn.Linear(200, 300)})
    config = LoroConfig(rank=50, target_modules=("attn",))
    layer = parametrize(model, config)["attn"]
    assert isinstance(layer, LowRankLinear)
    assert layer.B.std().item() == pytest.approx((2 / 350) ** 0.5, rel=0.03)
    assert layer.A.std().item() == pytest.approx((2 / 250) ** 0.5, rel=0.03)
    torch.testing.assert_close(densify(model.state_dict(), config)["attn.weight"], layer.B @ layer.A)
    assert config.lazy_scale(layer) == 0.25
    assert LoroConfig(rank=50, lazy_lr_scale=0.5).lazy_scale(layer) == 0.5


@pytest.mark.parametrize(
    ("section", "more", "message"),
    [
        ({"exact_every": 0}, {}, "exact_every is 0; write at least 1"),
        ({"exact_every": 20}, {}, 'steps is 20 and exact_every 20, so .* write "restart_warmup_steps": 19 or less'),
        ({"lazy_lr_scale": 0.0}, {}, "lazy_lr_scale is 0.0; write a positive number"),
        ({"restart": "none"}, {}, '"all", "factors"'),
        ({"alpha": 4}, {}, "no scale"),
        ({}, {"refactorization": {"interval": 5}}, "refactorizes them at each exact step itself"),
        ({}, {"momentum_reset": {"interval": 50}}, 'write "restart" and'),
        ({}, {"optimizer": {"type": "Muon"}}, "an exact step follows the directions of Adam"),
    ],
)
def test_what_is_refused(section, more, message):
    with pytest.raises(UserError, match=message):
        MegalrConfig.from_json({"megalr": {"parametrization": {"type": "loro", "rank": 4, **section}, **more}})
