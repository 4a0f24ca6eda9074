"""Every rule against its plain reference, and what all rules promise of their state and of gradients that are zero.

Rules compute in fp32, references in fp64 from the same gradients. Both start from the same fp32 singular vectors and
random matrices, since the sign of a singular vector is an accident of the arithmetic. What remains is rounding, and
what Adam makes of it: in the first update after its moments were zero N is the sign of R, so an entry of R as small as
ε carries its relative error straight into the weights. Measured, the weights differ by 1e-7 to 7e-6; the bound is 2e-5.
"""

import dataclasses
import io
import itertools

import pytest
import torch

import megalr
from megalr.rules.base import tensors_of
from megalr.rules.registry import RULES
from megalr.rules.registry import hyperparameters as hyperparameters_of
from tests.references import REFERENCES, hyperparameters, reference_for
from tests.unit.rule_runs import (
    NAME,
    SEED,
    SHAPES,
    drifting_gradients,
    reference_weights,
    rule_weights,
    run_from,
    worst,
)

UPDATES = 25
BOUND = 2e-5
KEYS = {name: hyperparameters_of(rule) for name, rule in RULES.items() if rule is not None}
OWN_TESTS = {"FRUGAL", "QGaLoreAdamW", "AdaRankGrad"}  # whose bounds or settings are others
PROJECTED = [name for name, keys in KEYS.items() if "proj_type" in keys and name not in OWN_TESTS]
WHOLE = [name for name, keys in KEYS.items() if "proj_type" not in keys]
KEPT_MOMENTS = [name for name in PROJECTED if "moments" in KEYS[name]]
SIDES = ["std", "reverse_std", "left", "right"]


def small(type_name, **changes):
    """Hyper-parameters that refresh several times within the updates of a test."""
    return {**REFERENCES[type_name].short, **changes}


def difference(type_name, params, shape, *, phase=0, gradients=None):
    gradients = drifting_gradients(shape, UPDATES) if gradients is None else gradients
    reference = reference_for(type_name, shape, params, seed=SEED, name=NAME, phase=phase)
    return worst(
        rule_weights(RULES[type_name](**params), gradients, phase=phase), reference_weights(reference, gradients)
    )


def rules():
    return [(name, RULES[name](**small(name))) for name in KEYS]


@pytest.mark.parametrize("proj_type", SIDES)
@pytest.mark.parametrize("type_name", PROJECTED)
def test_rule_equals_its_reference(type_name, proj_type):
    for shape, phase in itertools.product(SHAPES, (0, 2)):
        if type_name == "OnlineSubspaceDescent" and complete_basis(shape, proj_type):
            continue  # see test_a_complete_basis_of_online_subspace_descent
        assert difference(type_name, small(type_name, proj_type=proj_type), shape, phase=phase) < BOUND, (shape, phase)


@pytest.mark.parametrize("type_name", WHOLE)
def test_rule_without_a_projection_equals_its_reference(type_name):
    for shape in SHAPES:
        assert difference(type_name, small(type_name), shape) < BOUND, shape


def complete_basis(shape, proj_type):
    """Whether a basis of rank 4 spans its whole space, of more than one dimension."""
    (side,) = RULES["GaLoreAdamW"](proj_type=proj_type).sides(shape)
    return 1 < (shape[0] if side == "left" else shape[1]) <= 4


@pytest.mark.parametrize("projector", ["svd", "random"])
@pytest.mark.parametrize("moments", ["keep", "reset", "transport"])
@pytest.mark.parametrize("type_name", KEPT_MOMENTS)
def test_moments_at_a_refresh_equal_the_reference(type_name, moments, projector):
    for shape, phase in itertools.product(SHAPES, (0, 5)):
        params = small(type_name, moments=moments, projector=projector)
        assert difference(type_name, params, shape, phase=phase) < BOUND, (shape, phase)


@pytest.mark.parametrize("projector", ["svd", "random"])
@pytest.mark.parametrize("moments", ["keep", "reset", "transport"])
@pytest.mark.parametrize("type_name", ["GaLoreAdamW", "GoLoreAdamW"])
def test_both_sides_equal_the_reference(type_name, moments, projector):
    """ε is 0.01 here, and the bound wider.

    Pᵀ G Q of G's own singular vectors is diagonal, so all else in R is rounding of about 1e-8. Adam divides that by its
    own size plus ε, and with ε = 1e-6 makes up to a tenth of an update's largest entry of it.
    """
    for shape, phase in itertools.product(SHAPES, (0, 2)):
        params = small(type_name, proj_type="full", moments=moments, projector=projector, eps=1e-2)
        assert difference(type_name, params, shape, phase=phase) < 10 * BOUND, (shape, phase)


@pytest.mark.parametrize(
    ("type_name", "params"),
    [
        ("APOLLO", {"scale_type": "tensor", "scale": 4.0}),
        ("APOLLOMini", {"scale_type": "channel", "rank": 2}),
        ("LDAdamW", {"error_feedback": False}),
        ("LDAdamW", {"rho": 0.0, "betas": (0.8, 0.9)}),
        ("GoLoreAdamW", {"random_from": 0}),
        ("GaLoreAdamW", {"scale": 2.0, "betas": (0.5, 0.9), "eps": 1e-8, "update_proj_gap": 1}),
        ("FiraAdamW", {"scale": 1.0, "update_proj_gap": 1}),
        ("OnlineSubspaceDescent", {"update_proj_gap": 100, "projector": "random"}),
        ("Muon", {"momentum": 0.8, "ns_steps": 3}),
    ],
)
def test_other_hyperparameters_equal_the_reference(type_name, params):
    for shape in [(12, 20), (20, 12), (7, 13)]:
        assert difference(type_name, small(type_name, **params), shape) < BOUND, shape


@pytest.mark.parametrize("adjust_lr_fn", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_equals_its_reference(nesterov, adjust_lr_fn):
    """Five steps multiply the smallest singular values, and their rounding, by up to 3.4445⁵ = 485."""
    for shape in SHAPES:
        params = {"nesterov": nesterov, "adjust_lr_fn": adjust_lr_fn}
        assert difference("Muon", params, shape) < BOUND, shape


@pytest.mark.parametrize("phase", [0, 2])
@pytest.mark.parametrize(
    "params",
    [
        {},
        {"projector": "svd"},
        {"projector": "random", "moments": "transport", "state_free_scale": 0.1},
        {"moments": "keep", "density": 0.5, "betas": (0.8, 0.95), "eps": 1e-6},
        {"projector": "svd", "proj_type": "reverse_std"},
    ],
)
def test_frugal_equals_its_reference(params, phase):
    for shape in SHAPES:
        if params.get("projector", "columns") != "columns" and min(shape) == 1:
            continue  # P is the whole space, and the rest is rounding, of which signs make full steps
        assert difference("FRUGAL", small("FRUGAL", **params), shape, phase=phase) < BOUND, shape


def test_q_galore_equals_its_reference():
    """A code that lies on the edge between two may fall differently in fp32 and in fp64: the bound is for that."""
    for shape, phase, bits in itertools.product(SHAPES, (0, 2), ({}, {"min_8bit_size": 4096}, {"proj_type": "left"})):
        params = small("QGaLoreAdamW", cos_threshold=0.9, **bits)
        assert difference("QGaLoreAdamW", params, shape, phase=phase) < 1e-3, (shape, phase)


def test_q_galore_refreshes_what_stays_less_often():
    counts = {}
    for threshold in (0.0, 1.1):
        rule = RULES["QGaLoreAdamW"](**small("QGaLoreAdamW", cos_threshold=threshold))
        state = rule.init_state((12, 20))
        run_from(rule, state, drifting_gradients((12, 20), 40))
        counts[threshold] = (state["refreshes"], state["gap"])
    # Refreshes at 0, 3, 6, then with gaps of 6, 12, 24: at 12, 24, and so on while the queue's mean is high.
    assert counts == {0.0: (5, 24), 1.1: (14, 3)}


@pytest.mark.parametrize("moments", ["keep", "reset", "transport"])
@pytest.mark.parametrize("energy", [0.5, 0.9, 1.0])
def test_adarankgrad_equals_its_reference(energy, moments):
    for shape, phase in itertools.product(SHAPES, (0, 2)):
        params = small("AdaRankGrad", energy=energy, moments=moments)
        assert difference("AdaRankGrad", params, shape, phase=phase) < BOUND, (shape, phase)


def test_the_rank_of_adarankgrad_falls_and_never_grows():
    """Spectra that decay faster and faster, then slowly again."""
    rule = RULES["AdaRankGrad"](rank=8, update_proj_gap=1, energy=0.95)
    state, ranks = rule.init_state((16, 20)), []
    for t, decay in enumerate((0.9, 0.8, 0.6, 0.3, 0.1, 0.9)):
        (grad,) = drifting_gradients((16, 20), 1, decay=decay)
        basis = rule.new_basis(grad, state, updates=t, seed=SEED, name=NAME)
        update = rule.update(grad, state, basis)
        ranks.append(int(state["left"].any(0).sum()))
        assert torch.linalg.matrix_rank(update) == ranks[-1]
        explained = (state["left"].T @ grad).square().sum() / grad.square().sum()
        assert explained >= 0.95 or ranks[-1] == ([8, *ranks])[-2]
    assert ranks == sorted(ranks, reverse=True) and ranks[0] == 8 and ranks[-1] <= 2


def test_badam_takes_turns():
    names = [f"model.layers.{i}.{part}.weight" for i in range(3) for part in ("attn", "mlp")] + ["pool.weight"]
    rule = RULES["BAdam"](switch_interval=2)
    active = [frozenset(names) - rule.resting(names, t, SEED) for t in range(16)]
    assert all(active[t] == active[t + 1] for t in range(0, 16, 2))
    layers = [frozenset(names[2 * i : 2 * i + 2]) for i in range(3)] + [frozenset(names[-1:])]
    for begin in (0, 8):  # each block once before any has a second turn
        assert sorted(map(sorted, active[begin : begin + 8 : 2])) == sorted(map(sorted, layers))
    ascending = RULES["BAdam"](switch_interval=1, block_order="ascending")
    assert [frozenset(names) - ascending.resting(names, t, 0) for t in range(5)] == [*layers, layers[0]]
    descending = RULES["BAdam"](switch_interval=1, block_order="descending")
    assert [frozenset(names) - descending.resting(names, t, 0) for t in range(4)] == layers[::-1]
    chosen = RULES["BAdam"](switch_interval=1, block_order="ascending", blocks=("mlp", "layers.1"))
    assert frozenset(names) - chosen.resting(names, 2, 0) == {"model.layers.1.attn.weight"}
    with pytest.raises(megalr.UserError, match="'ffn' names no matrix of its own"):
        RULES["BAdam"](blocks=("ffn",)).resting(names, 0, 0)


@pytest.mark.parametrize("block_order", ["random", "ascending", "descending"])
def test_badam_equals_its_reference(block_order):
    """Matrices of three layers, each with its own reference; who rests has no state, and no weight decay."""
    names = [f"layers.{i}.{part}" for i in range(3) for part in ("a.weight", "b.weight")]
    params = {"switch_interval": 3, "block_order": block_order}
    rule = RULES["BAdam"](**params)
    references = {n: reference_for("BAdam", (7, 5), params, seed=SEED, name=n, phase=0, names=names) for n in names}
    weights = {name: torch.ones(7, 5) for name in names}
    expected = {name: torch.ones(7, 5, dtype=torch.float64) for name in names}
    states = {}
    for t, grad in enumerate(drifting_gradients((7, 5), 30)):
        resting = rule.resting(names, t, SEED)
        for name in names:
            references[name].step(expected[name], grad.double(), 0.01, 0.1)
            if name in resting:
                states.pop(name, None)
                continue
            state = states.setdefault(name, rule.init_state((7, 5)))
            weights[name] *= 1 - 0.01 * 0.1
            rule.apply(weights[name], grad, state, None, lr=0.01)
        assert worst(list(weights.values()), list(expected.values())) < BOUND, t


@pytest.mark.parametrize("type_name", ["AdamMini", "CAME", "Muon", "BAdam"])
def test_a_momentum_reset_equals_that_of_the_reference(type_name):
    for shape in SHAPES:
        rule, reference = RULES[type_name](), REFERENCES[type_name](shape)
        if type_name == "BAdam":
            reference = reference_for(type_name, shape, {}, seed=SEED, name=NAME, phase=0)
        state = rule.init_state(shape)
        weight, expected = torch.zeros(shape), torch.zeros(shape, dtype=torch.float64)
        for t, grad in enumerate(drifting_gradients(shape, UPDATES)):
            rule.apply(weight, grad, state, None, lr=0.01)
            reference.step(expected, grad.double(), 0.01)
            if t in (4, 15):
                rule.reset(state)
                reference.reset()
        assert (weight - expected).norm() < BOUND * expected.norm(), shape


@pytest.mark.parametrize("part", ["head", "embedding"])
def test_scale_of_the_ends_equals_its_reference(part):
    rule = {"head": RULES["SCALE"]().for_head(), "embedding": RULES["SCALE"]().for_embedding()}[part]
    for shape in SHAPES:
        gradients = drifting_gradients(shape, UPDATES)
        expected = reference_weights(REFERENCES["SCALE"](shape, part=part), gradients)
        assert worst(rule_weights(rule, gradients), expected) < BOUND, shape
    state = rule.init_state((5, 3))
    assert rule.state_numel((5, 3)) == sum(t.numel() for t in tensors_of(state).values()) == (part == "head") * 15


@pytest.mark.parametrize("type_name", [*PROJECTED, *WHOLE, "FRUGAL", "AdaRankGrad"])
def test_a_zero_gradient_among_others_equals_the_reference(type_name):
    """The norm-growth limiter lets anything follow a zero, and an error that was fed back moves the weights still."""
    gradients = drifting_gradients((12, 20), UPDATES)
    for zero in (7, 8, 15):
        gradients[zero] = torch.zeros(12, 20)
    assert difference(type_name, small(type_name), (12, 20), gradients=gradients) < BOUND


def test_a_complete_basis_of_online_subspace_descent():
    """A square basis leaves no loss: its slope is rounding, which Adam makes steps of. It stays near orthonormal."""
    gap = 50
    for shape, side in [((3, 10), "left"), ((10, 3), "right")]:
        rule = RULES["OnlineSubspaceDescent"](rank=4, update_proj_gap=gap)
        state = rule.init_state(shape)
        for updates, grad in enumerate(drifting_gradients(shape, 100)):
            due = rule.refresh_due(state, updates, 0)
            basis = rule.new_basis(grad, state, updates=updates, seed=SEED, name=NAME) if due else None
            rule.update(grad, state, basis)
        assert (state[side].T @ state[side] - torch.eye(3)).abs().max() < 10 / gap


@pytest.mark.parametrize("type_name", KEYS)
def test_defaults_equal_the_references(type_name):
    expected = hyperparameters(REFERENCES[type_name])
    fields = {f.name: f.default for f in dataclasses.fields(RULES[type_name])}
    of_rule = {k: v for k, v in fields.items() if k not in {*RULES[type_name].unused, "stagger", "random_from"}}
    assert of_rule == {key: expected[key] for key in of_rule}


@pytest.mark.parametrize("shape", SHAPES)
def test_state_is_fp32_tensors_and_counts_of_the_size_that_is_said(shape):
    for name, rule in rules():
        state = rule.init_state(shape)
        before = {key: value.shape for key, value in tensors_of(state).items()}
        run_from(rule, state, drifting_gradients(shape, 8))
        tensors = tensors_of(state)
        assert {value.dtype for value in tensors.values()} <= REFERENCES[name].dtypes, name
        size = sum(value.numel() * value.element_size() for value in tensors.values())
        assert size == rule.state_bytes(shape), name
        assert all(type(value) is int for key, value in state.items() if key not in tensors), name
        assert {key: value.shape for key, value in tensors.items()} == before, name
        assert sum(value.numel() for value in tensors.values()) == rule.state_numel(shape), name
        assert set(rule.basis_keys(shape)) <= set(tensors), name


def test_state_of_both_sides():
    rule = RULES["GaLoreAdamW"](rank=4, proj_type="full")
    assert rule.state_numel((20, 12)) == 2 * 4 * 4 + 20 * 4 + 12 * 4
    assert sum(t.numel() for t in tensors_of(rule.init_state((20, 12))).values()) == rule.state_numel((20, 12))


def test_a_saved_state_goes_on_as_if_it_had_not_been_saved():
    gradients = drifting_gradients((12, 20), 20)
    for name, rule in rules():
        state = rule.init_state((12, 20))
        run_from(rule, state, gradients[:9])
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
        expected = run_from(rule, state, gradients[9:], start=9)
        for got, wanted in zip(run_from(rule, loaded, gradients[9:], start=9), expected, strict=True):
            assert torch.equal(got, wanted), name


def test_gradient_and_the_state_before_a_new_basis_are_left_alone():
    for name, rule in rules():
        state = rule.init_state((12, 20))
        for updates, grad in enumerate(drifting_gradients((12, 20), 8)):
            kept, basis = grad.clone(), None
            if rule.refresh_due(state, updates, 0):
                before = {key: value.clone() for key, value in tensors_of(state).items()}
                basis = rule.new_basis(grad, state, updates=updates, seed=SEED, name=NAME)
                assert set(basis) == set(rule.basis_keys((12, 20))), name
                assert all(torch.equal(state[key], value) for key, value in before.items()), name
            rule.update(grad, state, basis)
            assert torch.equal(grad, kept), name


def test_updates_do_not_share_memory_with_the_gradient_or_the_state():
    """An owner sends the update while the next gradient arrives, and scales it in place."""
    for name, rule in rules():
        state = rule.init_state((12, 20))
        for updates, grad in enumerate(drifting_gradients((12, 20), 3)):
            due = rule.refresh_due(state, updates, 0)
            basis = rule.new_basis(grad, state, updates=updates, seed=SEED, name=NAME) if due else None
            update = rule.update(grad, state, basis)
            memory = {t.untyped_storage().data_ptr() for t in (grad, *tensors_of(state).values())}
            assert update.untyped_storage().data_ptr() not in memory, name
            assert update.shape == grad.shape and update.dtype == torch.float32, name


@pytest.mark.parametrize("proj_type", SIDES)
@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (1, 9)])
def test_zero_gradients_give_finite_updates(shape, proj_type):
    zeros, some = [torch.zeros(shape)] * 8, drifting_gradients(shape, 4)
    for name in (*PROJECTED, *WHOLE):
        rule = RULES[name](**small(name, **({} if name in WHOLE else {"proj_type": proj_type})))
        state = rule.init_state(shape)
        for gradients, start in ((zeros, 0), (some, 8), (zeros, 12)):
            made = run_from(rule, state, gradients, start=start)
            assert all(torch.isfinite(update).all() for update in made), name
            assert all(torch.isfinite(value).all() for value in tensors_of(state).values()), name


@pytest.mark.parametrize("type_name", ["GaLoreAdamW", "FiraAdamW"])
def test_zero_gradients_leave_a_basis_of_subspace_iteration(type_name):
    rule = RULES[type_name](rank=4, update_proj_gap=1, projector="power")
    state = rule.init_state((12, 20))
    run_from(rule, state, drifting_gradients((12, 20), 3))
    basis = state["left"].clone()
    run_from(rule, state, [torch.zeros(12, 20)] * 3, start=3)
    assert torch.equal(state["left"], basis)


@pytest.mark.parametrize(("type_name", "rule"), rules())
def test_applying_equals_subtracting_the_update(type_name, rule):
    """Some rules never form the update; weights and states end the same."""
    for shape in SHAPES:
        subtracted, applied = torch.zeros(shape), torch.zeros(shape)
        states = rule.init_state(shape), rule.init_state(shape)
        for updates, grad in enumerate(drifting_gradients(shape, 8)):
            bases = [
                rule.new_basis(grad, state, updates=updates, seed=SEED, name=NAME)
                if rule.refresh_due(state, updates, 0)
                else None
                for state in states
            ]
            subtracted -= 0.01 * rule.update(grad, states[0], bases[0])
            rule.apply(applied, grad, states[1], bases[1], lr=0.01)
        torch.testing.assert_close(applied, subtracted, rtol=1e-5, atol=1e-7)
