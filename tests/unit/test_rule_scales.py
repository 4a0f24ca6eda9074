"""What normalizes a gradient does not depend on its size: nothing is added to a norm, and no square is lost."""

import pytest
import torch

from megalr.rules.bases import leading_basis
from megalr.rules.registry import RULES
from megalr.rules.scaling import unit
from tests.unit.rule_runs import NAME, SEED, SHAPES, drifting_gradients

# fp32 reaches from 2⁻¹²⁶ to 2¹²⁸, and its squares from 2⁻⁶³ to 2⁶⁴. Entries of the gradients reach down to about 2⁻²⁰.
POWERS = [-100, -60, -23, 23, 60, 100]


def updates_of(rule, gradients):
    state, made = rule.init_state(gradients[0].shape), []
    for updates, grad in enumerate(gradients):
        due = rule.refresh_due(state, updates, 0)
        basis = rule.new_basis(grad, state, updates=updates, seed=SEED, name=NAME) if due else None
        made.append(rule.update(grad, state, basis))
    return made, state


RULES_WITHOUT_A_SIZE = {
    "Muon": RULES["Muon"](),
    "Muon in bf16": RULES["Muon"](ns_dtype="bfloat16"),
    "SCALE": RULES["SCALE"](),
    "SCALE of the head": RULES["SCALE"]().for_head(),
    "SCALE of an embedding": RULES["SCALE"]().for_embedding(),
}


@pytest.mark.parametrize("name", RULES_WITHOUT_A_SIZE)
def test_powers_of_two_change_no_bit_of_an_update(name):
    rule = RULES_WITHOUT_A_SIZE[name]
    for shape in SHAPES:
        gradients = drifting_gradients(shape, 3)
        expected, _ = updates_of(rule, gradients)
        assert all(update.norm() > 0.5 for update in expected)
        for power in POWERS:
            got, _ = updates_of(rule, [grad * 2.0**power for grad in gradients])
            assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True)), (shape, power)


@pytest.mark.parametrize("name", RULES_WITHOUT_A_SIZE)
def test_small_gradients_give_whole_updates(name):
    """As small as bf16 gradients of large batches are; and as subnormal numbers, of which few bits are left."""
    (grad,) = drifting_gradients((12, 20), 1)
    grad = grad.bfloat16().float()
    sizes = [1.0, 1e-6, 1e-8, 1e-20, 1e-42, 0.0]
    whole, *small, subnormal, zero = (updates_of(RULES_WITHOUT_A_SIZE[name], [grad * size])[0][0] for size in sizes)
    assert all((update - whole).norm() < 1e-2 * whole.norm() for update in small)
    assert 0.8 < subnormal.norm() / whole.norm() < 1.2
    assert torch.equal(zero, torch.zeros(12, 20))


def test_the_basis_of_online_subspace_descent_moves_alike():
    rule = RULES["OnlineSubspaceDescent"](rank=4, projector="random", update_proj_gap=20)
    gradients = drifting_gradients((12, 20), 6)
    _, expected = updates_of(rule, gradients)
    for power in POWERS[1:-1]:
        _, state = updates_of(rule, [grad * 2.0**power for grad in gradients])
        assert torch.equal(state["left"], expected["left"]), power


def test_adarankgrad_keeps_the_same_rank():
    (grad,) = drifting_gradients((12, 20), 1)
    rule = RULES["AdaRankGrad"](rank=8, energy=0.9)
    ranks = set()
    for power in (0, *POWERS):
        basis = rule.new_basis(grad * 2.0**power, rule.init_state((12, 20)), updates=0, seed=SEED, name=NAME)
        ranks.add(int(basis["left"].any(0).sum()))
    assert len(ranks) == 1 and ranks < {1, 2, 3, 4, 5, 6, 7}


@pytest.mark.parametrize("projector", ["svd", "eigh", "randomized", "power"])
def test_bases_are_the_same(projector):
    first, grad = drifting_gradients((12, 20), 2)
    previous = torch.linalg.svd(first)[0][:, :4]

    def basis(matrix):
        generator = torch.Generator().manual_seed(0)
        return leading_basis(matrix, 4, "left", projector, previous=previous, generator=generator, name=NAME)

    for power in POWERS:
        torch.testing.assert_close(basis(grad * 2.0**power), basis(grad), rtol=0, atol=1e-5)


def test_units_of_rows_and_columns():
    grad = torch.tensor([[3.0, 4.0], [0.0, 0.0], [3e-30, -4e-30], [3e30, 4e30]])
    expected = torch.tensor([[0.6, 0.8], [0.0, 0.0], [0.6, -0.8], [0.6, 0.8]])
    torch.testing.assert_close(unit(grad, 1), expected)
    torch.testing.assert_close(unit(grad.T, 0), expected.T)
    assert unit(grad).norm().item() == pytest.approx(1.0)
