"""A refactorization carries Muon's momentum exactly: it is that of the new factors' gradients."""

import pytest
import torch
from torch import nn

import megalr

LR, MU, RANK = 1e-2, 0.95, 3


def trained(updates, refactorizes, moments="transport", rule="Muon"):
    """Factors and momenta before each event and at the end, and the gradients of the product at each update.

    The loss is <C, B A> with another C at each update, so that dL/dB = C Aᵀ and dL/dA = Bᵀ C.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 7, bias=False))
    config = {
        "optimizer": {"type": rule, "params": {"lr": LR}},
        "megalr": {
            "parametrization": {"type": "low_rank", "rank": RANK, "target_modules": ["0"]},
            "refactorization": {"interval": updates if refactorizes else updates + 1, "moments": moments},
        },
    }
    megalr.parametrize(model, config)
    optimizer = megalr.build_optimizer(model, config)
    history, layer = [], model[0]
    for t in range(updates):
        c = torch.randn(7, 9, generator=torch.Generator().manual_seed(t))
        history.append((c.double(), layer.B.detach().double().clone(), layer.A.detach().double().clone()))
        optimizer.zero_grad()
        (c * (layer.B @ layer.A)).sum().backward()
        optimizer.step()
    states = optimizer.matrix_states
    momenta = {n: states[f"0.{n}"]["momentum_buffer"].double() for n in ("B", "A")}
    return layer.B.detach().double(), layer.A.detach().double(), momenta, history


def test_the_momentum_is_that_of_the_new_factors_gradients():
    """The same history of gradients, taken with respect to the factors as they would have been: B M and M⁻¹ A."""
    old_b, old_a, before, _ = trained(4, refactorizes=False)
    b, a, after, history = trained(4, refactorizes=True)
    torch.testing.assert_close(b @ a, old_b @ old_a, rtol=1e-5, atol=1e-6)
    assert (b - old_b).norm() > 0.1 * b.norm()  # it has changed the factors
    turn = torch.linalg.lstsq(old_b, b).solution
    expected = {"B": torch.zeros(7, RANK).double(), "A": torch.zeros(RANK, 9).double()}
    for c, b_then, a_then in history:
        expected["B"] = MU * expected["B"] + (1 - MU) * c @ (torch.linalg.inv(turn) @ a_then).T
        expected["A"] = MU * expected["A"] + (1 - MU) * (b_then @ turn).T @ c
    for name, momentum in after.items():
        torch.testing.assert_close(momentum, expected[name], rtol=1e-4, atol=1e-6)
        assert (momentum - before[name]).norm() > 0.1 * momentum.norm()


def test_reset_and_keep_stay_what_they_were():
    *_, kept, _ = trained(4, refactorizes=True, moments="keep")
    *_, untouched, _ = trained(4, refactorizes=False)
    *_, zeroed, _ = trained(4, refactorizes=True, moments="reset")
    for name in kept:
        torch.testing.assert_close(kept[name], untouched[name])
        assert not zeroed[name].any()


@pytest.mark.parametrize("rule", ["SPAM", "StableSPAM", "CAME", "AdamMini", "BAdam", "SCALE"])
def test_what_is_not_linear_in_gradients_is_refused(rule):
    with pytest.raises(megalr.UserError, match='or Muon\'s momentum: write "reset" or "keep" with'):
        trained(1, refactorizes=True, rule=rule)
