"""SwitchLoRA: what the layer computes, how it starts, that switches change no output, and what cannot be combined."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import megalr
from megalr.config.settings import MegalrConfig
from megalr.errors import UserError
from megalr.layers import densify, factor_pairs, parametrize
from megalr.layers.switchlora import SwitchLoraConfig

TARGETS = {"target_modules": ("attn",)}


def dense_of(m, n):
    torch.manual_seed(0)
    return nn.ModuleDict({"attn": nn.Linear(n, m)})


def test_both_passes_are_autograds_of_the_formula_and_it_exports():
    dense, config = dense_of(8, 6), SwitchLoraConfig(rank=3, alpha=1.5, **TARGETS)
    model = parametrize(copy.deepcopy(dense), config)
    layer = model["attn"]
    assert not list(factor_pairs(model)) and torch.equal(layer.weight, dense["attn"].weight)
    x = torch.randn(2, 5, 6, requires_grad=True)
    expected = nn.functional.linear(x, layer.weight + 0.5 * layer.B.T @ layer.A, layer.bias)
    grad = torch.randn_like(expected)
    wanted = [x, layer.B, layer.A, layer.bias]
    for got, right in zip(
        torch.autograd.grad(layer(x), wanted, grad), torch.autograd.grad(expected, wanted, grad), strict=True
    ):
        torch.testing.assert_close(got, right)
    dense.load_state_dict(densify(model.state_dict(), config))
    torch.testing.assert_close(dense["attn"](x), layer(x))


@pytest.mark.parametrize("shape", [(400, 100), (100, 400)])
def test_the_product_starts_with_the_variance_of_a_linear_layer(shape):
    layer = parametrize(dense_of(*shape), SwitchLoraConfig(rank=50, **TARGETS))["attn"]
    product = layer.scale * layer.B.T @ layer.A
    assert product.std().item() == pytest.approx((3 * shape[1]) ** -0.5, rel=0.05)


def test_switches_change_no_output_and_rest_their_counterparts():
    torch.manual_seed(0)
    model = nn.Sequential()
    model.attn = nn.Linear(9, 7)
    section = {"type": "switchlora", "rank": 4, "switch_interval": 4, "frozen_steps": 2, "descent_steps": None}
    config = {
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "megalr": {"parametrization": {**section, "target_modules": ["attn"]}},
    }
    megalr.parametrize(model, config)
    optimizer = megalr.build_optimizer(model, config)
    layer, events, x = model.attn, optimizer.layer_events, torch.randn(4, 9)
    switch = events.end_update
    outputs = []

    def watched(updates):
        outputs.append(layer(x).detach())
        changed = switch(updates)
        outputs.append(layer(x).detach())
        return changed

    events.end_update = watched
    moved = []
    for _ in range(12):
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        resting = [i for i, start in enumerate(events._starts["attn.A"]) if start > optimizer.updates]
        before, moments = layer.A.detach().clone(), optimizer.state.get(layer.A, {}).get("exp_avg")
        for i in resting:
            assert moments is None or not moments[i].any()
        optimizer.step()
        moved.append(len(resting))
        assert all(torch.equal(before[i], layer.A[i]) for i in resting if i not in _just_switched(events, "attn.A"))
    for one, other in zip(outputs[::2], outputs[1::2], strict=True):
        torch.testing.assert_close(one, other)
    assert set(moved[2:]) == {2}  # one row an update, each resting for two
    assert optimizer.refreshes == 2 * events._made["attn"] and events._made["attn"] >= 6


def _just_switched(events, factor):
    """The rows of a factor whose counterparts rest the longest."""
    other = events._starts["attn.B" if factor.endswith("A") else "attn.A"]
    return [i for i, start in enumerate(other) if start == max(other)]


@pytest.mark.parametrize(
    ("section", "more", "message"),
    [
        ({"rank": 1}, {}, "rank is 1: rows of A and of B take turns, so write at least 2"),
        ({"switch_interval": 9}, {}, "switch_interval is 9.0; with 5 frozen_steps write at least 10"),
        ({"frozen_steps": -1}, {}, "frozen_steps is -1; write at least 0"),
        ({"descent_steps": 0}, {}, "descent_steps is 0; write at least 1, or null"),
        ({}, {"refactorization": {"interval": 5}}, "switches single vectors of them"),
        ({}, {"momentum_reset": {"interval": 50}}, "layers reset moments vector by vector"),
        ({}, {"optimizer": {"type": "Muon"}}, "each vector has a count of its own"),
    ],
)
def test_what_is_refused(section, more, message):
    with pytest.raises(UserError, match=message):
        MegalrConfig.from_json({"megalr": {"parametrization": {"type": "switchlora", "rank": 4, **section}, **more}})


@pytest.mark.parametrize("shape", [(4, 9), (9, 4)])
def test_a_rank_that_leaves_no_candidate_is_refused(shape):
    with pytest.raises(UserError, match="no candidate to switch in attn, a . x . matrix: write a rank of at most 3"):
        parametrize(dense_of(*shape), SwitchLoraConfig(rank=4, **TARGETS))
    parametrize(dense_of(*shape), SwitchLoraConfig(rank=3, **TARGETS))
