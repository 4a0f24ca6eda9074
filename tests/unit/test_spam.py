"""SPAM's kin against their references: spikes, resets from within and without, vectors, the published behaviour."""

import pytest
import torch

import megalr
from megalr.rules.base import tensors_of
from megalr.rules.registry import RULES
from megalr.rules.spam import SPAM
from megalr.rules.stable_spam import StableSPAM
from tests.references import REFERENCES, reference_for
from tests.unit.rule_runs import LR, NAME, SEED, SHAPES, drifting_gradients, reference_weights, rule_weights, worst

BOUND = 2e-5
UPDATES = 40
SETTINGS = [
    {},
    {"reset_interval": 7},
    {"reset_interval": 0},
    {"reset_interval": 11, "total_steps": 20, "eta_min": 0.2},
    {"total_steps": 60, "gamma1": 0.85, "gamma2": 0.999, "theta": 0.9, "betas": (0.8, 0.95), "eps": 1e-6},
]


def spiky_gradients(shape, updates=UPDATES):
    """Now and then one entry is a thousandfold, or the whole gradient tenfold, or all of it zero."""
    gradients = drifting_gradients(shape, updates)
    for index in range(9, updates, 6):
        gradients[index][-1, index % shape[1]] *= 1000
        gradients[index - 3] *= 10
    gradients[updates // 2] = torch.zeros(shape)
    return gradients


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("settings", SETTINGS)
def test_stable_spam_equals_its_reference(settings, published):
    for shape in SHAPES:
        gradients = spiky_gradients(shape)
        expected = reference_weights(REFERENCES["StableSPAM"](shape, published=published, **settings), gradients)
        assert worst(rule_weights(StableSPAM(published=published, **settings), gradients), expected) < BOUND, shape


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"reset_interval": 50, "threshold": 10.0},
        {"reset_interval": 25, "warmup_steps": 10, "threshold": 2.0, "betas": (0.8, 0.95)},
        {"reset_interval": 0, "threshold": 10.0},
        {"reset_interval": 7, "warmup_steps": 0, "threshold": 0.0, "eps": 1e-8},
    ],
)
def test_spam_equals_its_reference(settings, published):
    for shape in SHAPES:
        gradients = spiky_gradients(shape, 60)
        expected = reference_weights(REFERENCES["SPAM"](shape, published=published, **settings), gradients)
        assert worst(rule_weights(SPAM(published=published, **settings), gradients), expected) < BOUND, shape


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("interval", [0, 11])
def test_sparse_moments_equal_the_reference(interval, published):
    params = {"density": 0.3, "reset_interval": interval, "warmup_steps": 4, "published": published}
    for shape in SHAPES:
        gradients = drifting_gradients(shape, UPDATES)
        reference = reference_for("SPAM", shape, params, seed=SEED, name=NAME, phase=0)
        assert worst(rule_weights(SPAM(**params), gradients), reference_weights(reference, gradients)) < BOUND, shape
        rule = SPAM(**params)
        state = rule.init_state(shape)
        assert rule.state_bytes(shape) == sum(t.numel() * t.element_size() for t in tensors_of(state).values())


def test_spam_clips_spikes_and_nothing_else():
    rule, state = SPAM(threshold=100.0), SPAM().init_state((3, 4))
    for _ in range(30):
        rule.update(torch.full((3, 4), 0.1), state, None)
    before = state["exp_avg"].clone()
    spike = torch.full((3, 4), 0.1)
    spike[1, 2] = -100.0
    limit = (100 * state["exp_avg_sq"][1, 2]).sqrt().item()
    rule.update(spike, state, None)
    spike[1, 2] = -limit
    torch.testing.assert_close(state["exp_avg"], 0.9 * before + 0.1 * spike)


def test_the_first_update_after_a_reset():
    """Adam's is the sign of the gradient; with the count that the published code keeps it is far larger."""
    gradients = [torch.ones(2, 3)] * 3000
    sizes = {}
    for published in (False, True):
        rule = SPAM(reset_interval=2999, warmup_steps=0, published=published)
        state = rule.init_state((2, 3))
        for grad in gradients[:2999]:
            update = rule.update(grad, state, None)
        sizes[published] = update[0, 0].item()
    assert sizes[False] == pytest.approx(1, rel=1e-3)
    assert sizes[True] == pytest.approx(3.16, rel=0.05)


def test_the_published_code_differs_from_the_first_reset_on():
    gradients = spiky_gradients((12, 20))
    paper, published = (rule_weights(StableSPAM(reset_interval=10, published=p), gradients) for p in (False, True))
    assert worst(paper[:9], published[:9]) == 0
    assert worst(paper[9:10], published[9:10]) > 1e-3
    assert worst(paper, published) > 1e-2


def test_the_cosine_stays_at_its_end():
    rule, published = (StableSPAM(total_steps=9, eta_min=0.5, published=p) for p in (False, True))
    assert rule.beta1_factor(10) == rule.beta1_factor(15) == published.beta1_factor(10) == 0.5
    assert published.beta1_factor(20) == 1.0


@pytest.mark.parametrize("optimizer", ["StableSPAM", "SPAM"])
def test_a_reset_from_without_equals_that_of_the_reference(optimizer):
    """As the optimizer's momentum reset makes it, at other updates than the rule's own."""
    for shape in SHAPES:
        rule = RULES[optimizer](reset_interval=9)
        reference = REFERENCES[optimizer](shape, reset_interval=9)
        state = rule.init_state(shape)
        weight, expected = torch.zeros(shape), torch.zeros(shape, dtype=torch.float64)
        for index, grad in enumerate(spiky_gradients(shape)):
            rule.apply(weight, grad, state, None, lr=LR)
            reference.step(expected, grad.double(), LR)
            if index in (4, 22, 25):
                rule.reset(state)
                reference.reset()
            assert (weight - expected).norm() < BOUND * expected.norm()


@pytest.mark.parametrize("optimizer", ["StableSPAM", "SPAM"])
def test_a_vector_is_a_matrix_with_one_row(optimizer):
    gradients = spiky_gradients((1, 30))
    reference = REFERENCES[optimizer]((30,), reset_interval=9)
    weight = torch.zeros(30, dtype=torch.float64)
    got = rule_weights(RULES[optimizer](reset_interval=9), gradients)
    for index, grad in enumerate(gradients):
        reference.step(weight, grad[0].double(), LR, 0.1)
        assert (got[index][0] - weight).norm() < BOUND * weight.norm()


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"gamma1": 1.0}, r"gamma1 is 1.0; write a number in \[0, 1\)"),
        ({"theta": -0.1}, "theta is -0.1"),
        ({"reset_interval": -1}, "reset_interval is -1; write a number of at least 0"),
        ({"total_steps": 0}, "total_steps is 0; write a number of at least 1"),
        ({"eta_min": 1.5}, r"eta_min is 1.5; write a number in \[0, 1\]"),
    ],
)
def test_mistakes(params, message):
    with pytest.raises(megalr.UserError, match=message):
        StableSPAM(**params)
    if "reset_interval" in params:
        with pytest.raises(megalr.UserError, match=message):
            SPAM(**params)
