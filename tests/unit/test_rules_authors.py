"""Where rules do as their authors' code, and how states and settings of an earlier default go on.

What authors do is written out here, or in the references, by which tests/unit/test_rules.py compares whole runs.
"""

import copy
import dataclasses
import json
import logging

import pytest
import torch
from torch import nn

import megalr
from megalr.config.settings import MegalrConfig
from megalr.optim.forms import changed_settings, rule_settings
from megalr.rules.quantization import dequantize_groups, quantize_groups
from megalr.rules.registry import RULES
from tests.references import reference_for
from tests.unit.rule_runs import LR, drifting_gradients, run_from

BOUND = 2e-5


def numbers_of(state):
    return {key: value for key, value in state.items() if isinstance(value, int)}


def trainer(type_name, shape=(12, 12), **params):
    """A model of one linear layer under a rule, with a step that takes its gradient; see :func:`step`."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(shape[1], shape[0], bias=False))
    config = {"optimizer": {"type": type_name, "params": {"lr": LR, "target_modules": ["0"], **params}}}
    return model, megalr.build_optimizer(model, config)


def step(model, optimizer, grad, lr=LR):
    optimizer.param_groups[0]["lr"] = lr
    model[0].weight.grad = grad.clone()
    optimizer.step()


# Online Subspace Descent: the basis follows the schedule of the learning rate.


RATES = [0.2, 0.6, 1.0, 1.0, 0.8, 0.5, 0.2, 0.1]  # warm-up and decay


@pytest.mark.parametrize("basis_lr", ["scheduled", "constant"])
def test_the_basis_follows_the_schedule(basis_lr):
    params = {"rank": 4, "update_proj_gap": 10, "scale": 1.0, "basis_lr": basis_lr}
    gradients = drifting_gradients((12, 20), len(RATES))
    model, optimizer = trainer("OnlineSubspaceDescent", (12, 20), **params)
    reference = reference_for("OnlineSubspaceDescent", (12, 20), params, seed=0, name="0.weight", phase=0)
    reference.initial_lr = LR  # of the JSON
    weight = model[0].weight.detach().double().clone()
    for grad, factor in zip(gradients, RATES, strict=True):
        step(model, optimizer, grad, lr=factor * LR)
        reference.step(weight, grad.double(), factor * LR)
    (state,) = optimizer.matrix_states.values()
    assert (state["left"] - reference.P).norm() < BOUND * reference.P.norm()
    assert (model[0].weight - weight).norm() < BOUND * weight.norm()


def test_a_basis_at_a_constant_rate_is_another_one():
    gradients = drifting_gradients((12, 20), len(RATES))
    bases = []
    for basis_lr in ("scheduled", "constant"):
        model, optimizer = trainer("OnlineSubspaceDescent", (12, 20), rank=4, update_proj_gap=10, basis_lr=basis_lr)
        for grad, factor in zip(gradients, RATES, strict=True):
            step(model, optimizer, grad, lr=factor * LR)
        (state,) = optimizer.matrix_states.values()
        bases.append(state["left"])
    assert (bases[0] - bases[1]).norm() > 1e-2


# LDAdam: square matrices are projected on the left; states made before that keep their side.


def test_ldadam_projects_square_matrices_on_the_left():
    for proj_type in ("std", "reverse_std", "left"):
        assert "left" in RULES["LDAdamW"](rank=4, proj_type=proj_type).init_state((12, 12))
    assert "right" in RULES["LDAdamW"](rank=4).init_state((13, 12))
    assert "right" in RULES["GaLoreAdamW"](rank=4).init_state((12, 12))


@pytest.mark.parametrize("way", ["room", "state_dict"])
def test_an_old_ldadam_state_keeps_its_side(way):
    """It goes on bit for bit as with "right", which is what "std" meant of square matrices; and again after a save."""
    gradients = drifting_gradients((12, 12), 9)
    right = RULES["LDAdamW"](rank=4, proj_type="right")
    old = right.init_state((12, 12))
    run_from(right, old, gradients[:3])
    del old["version"]
    expected = run_from(right, copy.deepcopy(old), gradients[3:], start=3)
    if way == "room":
        rule = RULES["LDAdamW"](rank=4)
        for begin in (3, 6):
            room = rule.room(numbers_of(old), (12, 12), "cpu")
            assert room.keys() == old.keys() and all(room[k].shape == old[k].shape for k in ("right", "exp_avg"))
            old = room | old
            got = run_from(rule, old, gradients[begin : begin + 3], start=begin)
            assert all(torch.equal(*pair) for pair in zip(got, expected[begin - 3 :], strict=False))
        return
    model, optimizer = trainer("LDAdamW", rank=4)
    step(model, optimizer, gradients[0])
    saved = optimizer.state_dict()
    saved["megalr"]["updates"] = 3
    saved["megalr"]["matrices"] = {"0.weight": numbers_of(old)}
    saved["megalr"]["tensors"] = {
        f"rule/0.weight/{k}": [v.clone()] for k, v in old.items() if isinstance(v, torch.Tensor)
    }
    optimizer.load_state_dict(saved)
    for grad, update in zip(gradients[3:], expected, strict=True):
        before = model[0].weight.detach().clone()
        step(model, optimizer, grad)
        torch.testing.assert_close(before - model[0].weight, LR * update, rtol=1e-3, atol=1e-7)
    assert "right" in optimizer.matrix_states["0.weight"]


# GoLore: a refresh turns the first moment alone.


def test_golore_turns_the_first_moment_alone():
    gradients = drifting_gradients((12, 20), 4)
    rule = RULES["GoLoreAdamW"](rank=4, random_from=3, update_proj_gap=3)
    state = rule.init_state((12, 20))
    run_from(rule, state, gradients[:3])
    m, v, old = (state[key].clone() for key in ("exp_avg", "exp_avg_sq", "left"))
    run_from(rule, state, gradients[3:], start=3)
    new = state["left"]
    assert not torch.allclose(old, new)
    low = new.T @ gradients[3]
    torch.testing.assert_close(state["exp_avg"], 0.9 * new.T @ old @ m + 0.1 * low)
    torch.testing.assert_close(state["exp_avg_sq"], 0.999 * v + 0.001 * low.square())


# APOLLO: the limiter sees the update without its scale and bias correction.


def test_apollos_limiter_sees_the_update_without_its_bias_correction():
    """Written as the authors' loop: the step size has the correction, behind the limiter."""
    gradients = drifting_gradients((12, 20), 12)
    gradients = [grad * (1 + 0.5 * (t % 3)) for t, grad in enumerate(gradients)]  # so that the limiter has work
    rule = RULES["APOLLO"](rank=4, scale=4.0, eps=1e-12)
    state = rule.init_state((12, 20))
    got, last, limited = run_from(rule, state, gradients), None, 0
    m = v = torch.zeros(4, 20)
    for t, (grad, update) in enumerate(zip(gradients, got, strict=True), start=1):
        low = state["left"].T @ grad
        m, v = 0.9 * m + 0.1 * low, 0.999 * v + 0.001 * low.square()
        scaled = grad * ((m / v.sqrt()).norm(dim=0) / low.norm(dim=0))
        if last is not None and scaled.norm() > 1.01 * last:
            scaled, limited = scaled * (1.01 * last / scaled.norm()), limited + 1
        last = scaled.norm()
        expected = scaled * 2.0 * (1 - 0.999**t) ** 0.5 / (1 - 0.9**t)
        torch.testing.assert_close(update, expected, rtol=1e-4, atol=1e-6)
    assert 3 <= limited < len(gradients)


def test_an_old_norm_of_apollo_goes_on_as_a_new_one():
    gradients = drifting_gradients((12, 20), 8)
    rule = RULES["APOLLO"](rank=4, scale=4.0)
    state = rule.init_state((12, 20))
    run_from(rule, state, gradients[:5])
    old = {key: value for key, value in copy.deepcopy(state).items() if key != "version"}
    old["norm"] *= 2.0 * (1 - 0.999**5) ** 0.5 / (1 - 0.9**5)  # with the scale's root and the bias correction
    old = rule.room(numbers_of(old), (12, 20), "cpu") | old
    assert "version" not in old
    expected, got = (run_from(rule, each, gradients[5:], start=5) for each in (state, old))
    for pair in zip(got, expected, strict=True):
        torch.testing.assert_close(*pair)


# Q-GaLore: matrices with one row or column train; the levels of a group reach to zero.


@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (1, 1)])
def test_q_galore_trains_single_rows_and_columns(shape):
    """As GaLore does, whose basis of one direction is ±1."""
    gradients = [-grad for grad in drifting_gradients(shape, 6)]
    settings = {"rank": 4, "eps": 1e-8}
    got, expected = (
        run_from(rule, rule.init_state(shape), gradients)
        for rule in (RULES[name](**settings) for name in ("QGaLoreAdamW", "GaLoreAdamW"))
    )
    for update, other in zip(got, expected, strict=True):
        assert (update - other).norm() < 1e-5 * other.norm()


def test_groups_of_one_sign_are_quantized_to_a_level():
    for values in (torch.full((1, 300), 0.7), -torch.rand(3, 100) - 0.5, torch.tensor([[1.0]]), torch.zeros(2, 9)):
        restored = dequantize_groups(*quantize_groups(values), tuple(values.shape))
        assert (restored - values).abs().max() <= values.abs().max() / 15 / 2 + 1e-6


# FRUGAL: the number of columns is truncated, the rank is a share of the projected side.


def test_frugal_takes_as_many_columns_and_dimensions_as_its_authors():
    columns = RULES["FRUGAL"](density=0.25)
    assert [columns.rank_of((8, n)) for n in (11, 10, 12, 3)] == [2, 2, 3, 1]
    bases = {side: RULES["FRUGAL"](density=0.25, projector="svd", proj_type=side) for side in ("std", "reverse_std")}
    assert {side: rule.rank_of((8, 20)) for side, rule in bases.items()} == {"std": 2, "reverse_std": 5}
    assert bases["reverse_std"].rank_of((2, 20)) == 2


@pytest.mark.parametrize(
    ("settings", "shape", "former"),
    [
        ({}, (8, 11), 3),
        ({"projector": "svd", "proj_type": "reverse_std"}, (8, 20), 2),
    ],
)
def test_an_old_frugal_state_keeps_its_columns(settings, shape, former):
    rule = RULES["FRUGAL"](density=0.25, update_proj_gap=2, **settings)
    old = rule.room({"refreshes": 0, "step": 0}, shape, "cpu")
    assert former in (old["exp_avg"].shape if "columns" not in old else old["columns"].shape)
    gradients = drifting_gradients(shape, 5)
    run_from(rule, old, gradients)
    assert "version" not in old and former in (old.get("columns", old["exp_avg"])).shape
    new = rule.init_state(shape)
    run_from(rule, new, gradients)
    assert new["version"] == 2 and rule.rank_of(shape) in (new.get("columns", new["exp_avg"])).shape


# Settings that checkpoints do not name, and those that they do.


def config_of(type_name, **params):
    return MegalrConfig.from_json({"optimizer": {"type": type_name, "params": params}})


def test_a_default_that_has_changed_is_reported():
    config = config_of("GoLoreAdamW", random_from=5)
    (note,) = changed_settings(None, config)
    assert 'goes on with "transport_first"; write "moments": "transport" for the former default' in note
    assert changed_settings(None, config_of("GoLoreAdamW", random_from=5, moments="transport")) == []
    assert changed_settings(None, config_of("AdamW")) == changed_settings({}, config_of("AdamW")) == []
    (note,) = changed_settings(None, config_of("QGaLoreAdamW"))
    assert "optimizer.params.eps was" in note and 'write "eps": 1e-06' in note
    (note,) = changed_settings(None, config_of("OnlineSubspaceDescent"))
    assert 'write "basis_lr": "constant"' in note


def test_settings_that_differ_from_the_checkpoints_are_reported():
    before, config = rule_settings(config_of("GaLoreAdamW", rank=4)), config_of("GaLoreAdamW", rank=4, scale=0.5)
    assert changed_settings(before, config) == ["optimizer.params.scale was 0.25 and is 0.5 now"]
    assert changed_settings(rule_settings(config), config) == []
    assert changed_settings(before, config_of("Muon")) == []


def test_a_load_says_so(caplog):
    model, optimizer = trainer("GoLoreAdamW", rank=4, random_from=5)
    step(model, optimizer, drifting_gradients((12, 12), 1)[0])
    saved = optimizer.state_dict()
    with caplog.at_level(logging.WARNING):
        optimizer.load_state_dict(saved)
        assert not caplog.messages
        del saved["megalr"]["settings"]  # as those who wrote it did not
        optimizer.load_state_dict(saved)
    assert ['"moments": "transport"' in message for message in caplog.messages] == [True]


def test_settings_are_json_whatever_a_users_rule_has():
    """A default need not be anything that JSON has; tuples are lists there."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Odd(RULES["Muon"]):
        dtype: torch.dtype = torch.float64

    config = config_of("Muon")
    odd = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, rule=Odd()))
    settings = rule_settings(odd)
    assert settings["dtype"] == "torch.float64" and settings["ns_coefficients"] == [3.4445, -4.775, 2.0315]
    assert changed_settings(json.loads(json.dumps(settings)), odd) == []
