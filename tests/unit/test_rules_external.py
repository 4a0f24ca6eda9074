"""Muon against torch's own, and APOLLO's random bases: their spread, and what they depend on."""

import itertools

import pytest
import torch

from megalr.rules.apollo import Apollo
from megalr.rules.apollo_mini import ApolloMini
from megalr.rules.muon import Muon
from tests.references.muon import Muon as MuonReference
from tests.unit.rule_runs import drifting_gradients


@pytest.mark.parametrize("adjust_lr_fn", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16), (7, 13)])
def test_muon_equals_torch(monkeypatch, shape, nesterov, adjust_lr_fn):
    """torch iterates in bfloat16 and rounds the momentum to it before it divides by the norm; megalr divides first.

    With 8 bits and singular values that grow up to 485-fold, that leaves 1e-2 to 3e-2 of the weights. Kept in fp32 by
    replacing its cast, torch does the same arithmetic as megalr.
    """
    ours, theirs = muon_weights(shape, nesterov, adjust_lr_fn, "bfloat16")
    assert relative(ours, theirs) < 0.06
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    ours, theirs = muon_weights(shape, nesterov, adjust_lr_fn, "float32")
    assert relative(ours, theirs) < 1e-5


def muon_weights(shape, nesterov, adjust_lr_fn, ns_dtype):
    """Weights of megalr's and of torch's Muon after ten updates from zero."""
    lr, weight_decay = 0.02, 0.1
    theirs = torch.nn.Parameter(torch.zeros(shape))
    optimizer = torch.optim.Muon(
        [theirs], lr=lr, weight_decay=weight_decay, nesterov=nesterov, adjust_lr_fn=adjust_lr_fn
    )
    rule = Muon(nesterov=nesterov, adjust_lr_fn=adjust_lr_fn, ns_dtype=ns_dtype)
    state, ours = rule.init_state(shape), torch.zeros(shape)
    for grad in drifting_gradients(shape, 10):
        ours -= lr * (rule.update(grad, state, None) + weight_decay * ours)
        theirs.grad = grad.clone()
        optimizer.step()
    return ours, theirs.detach()


def relative(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (64, 64)])
def test_muon_moves_singular_values_towards_one(shape):
    """ "original" leaves √max(1, m/n) in front, "match_rms_adamw" entries of mean square 0.2² over the longer side."""
    grad = drifting_gradients(shape, 1, decay=0.9)[0]
    rule = Muon()
    values = torch.linalg.svdvals(rule.update(grad, rule.init_state(shape), None)) / max(1, shape[0] / shape[1]) ** 0.5
    strong = torch.linalg.svdvals(grad) > 5e-3 * grad.norm()
    assert (values[strong] > 0.65).all() and (values < 1.25).all()


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("shape", [(24, 60), (60, 24), (24, 24)])
def test_muon_keeps_its_accuracy_on_an_ill_conditioned_gradient(shape, steps):
    """Singular values from 1 to 1e-8, against the iteration on X itself in float64; the Gram matrix squares them."""
    generator = torch.Generator().manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(shape[0], 24, generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(shape[1], 24, generator=generator, dtype=torch.float64))
    grad = left * torch.logspace(0, -8, 24, dtype=torch.float64) @ right.T
    rule = Muon(ns_steps=steps, momentum=0.0, nesterov=False)
    got = rule.update(grad.float(), rule.init_state(shape), None) / max(1, shape[0] / shape[1]) ** 0.5
    expected = MuonReference(shape, ns_steps=steps).newton_schulz(grad)
    assert relative(got.double(), expected) < 1e-4


def apollo_basis(seed=0, name="w", refreshes=0, rank=32, shape=(2000, 2000), proj_type="left", grad=None):
    rule = Apollo(rank=rank, proj_type=proj_type)
    state = rule.init_state(shape)
    state["refreshes"] = refreshes
    grad = torch.zeros(shape) if grad is None else grad
    (basis,) = rule.new_basis(grad, state, updates=0, seed=seed, name=name).values()
    return basis


def test_apollo_basis_is_gaussian_of_variance_one_over_the_rank():
    """P Pᵀ is then the identity in expectation, so ‖Pᵀ g‖ is ‖g‖ on average."""
    basis = apollo_basis()
    count = basis.numel()
    assert basis.shape == (2000, 32)
    assert abs(basis.mean().item()) < 4 * (32 * count) ** -0.5
    assert abs(basis.var().item() * 32 - 1) < 4 * (2 / count) ** 0.5
    assert abs(basis.pow(4).mean().item() * 32**2 / 3 - 1) < 0.05


def test_apollo_mini_basis_is_one_column_of_variance_one():
    rule = ApolloMini()
    (basis,) = rule.new_basis(
        torch.zeros(500, 5000), rule.init_state((500, 5000)), updates=0, seed=0, name="w"
    ).values()
    assert basis.shape == (500, 1) and abs(basis.var().item() - 1) < 4 * (2 / 500) ** 0.5


def test_apollo_basis_depends_on_seed_name_side_and_refresh_alone():
    generator = torch.Generator().manual_seed(1)
    small = {"shape": (30, 30), "rank": 4}
    keys = [
        {},
        {"seed": 1},
        {"name": "v"},
        {"refreshes": 1},
        {"proj_type": "right"},
    ]
    bases = [apollo_basis(**small, **key) for key in keys]
    for key, basis in zip(keys, bases, strict=True):
        torch.manual_seed(torch.randint(1000, (), generator=generator).item())
        grad = torch.randn(30, 30, generator=generator)
        assert torch.equal(apollo_basis(**small, **key, grad=grad), basis)
    for one, other in itertools.combinations(bases, 2):
        assert not torch.isclose(one, other).any(dim=0).all()
    # The other side's length does not matter.
    assert torch.equal(apollo_basis(shape=(30, 77), rank=4), bases[0])
