"""Refreshes where something changes R's gradient on its way to the optimizer."""

import logging

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import megalr
from megalr.optim.events import projected as projection

PARAMETRIZATION = {"type": "projected", "rank": 3, "update_proj_gap": 10, "projector": "power", "stagger": False}


def trained(side, steps, change, state=None):
    """A model of two layers whose gradients of R pass through ``change``; what AdamW was given, by update.

    ``state`` is the optimizer's that it goes on with.
    """
    torch.manual_seed(0)
    config = {
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "megalr": {"parametrization": {**PARAMETRIZATION, "side": side, "target_modules": ["0", "2"]}},
    }
    model = nn.Sequential(nn.Linear(9, 7, bias=False), nn.Tanh(), nn.Linear(7, 5, bias=False))
    megalr.parametrize(model, config)
    optimizer = megalr.build_optimizer(model, config)
    if state is not None:
        optimizer.load_state_dict(state)
    for layer in (model[0], model[2]):
        layer.R.register_hook(change)
    for _ in range(steps):
        before = [(layer, layer.basis.clone()) for layer in (model[0], model[2])]
        optimizer.zero_grad()
        model(torch.randn(32, 9)).sub(1).square().sum().backward()
        delivered = [layer.R.grad.clone() for layer, _ in before]
        optimizer.step()
    return optimizer, before, delivered


@pytest.mark.parametrize("side", ["input", "output"])
def test_a_gradient_that_is_changed_delays_a_refresh_and_does_not_prevent_it(side, monkeypatch, caplog):
    given = []
    original = projection.low_rank_adam

    def spied(weights, grads, *moments, **settings):
        given.append([grad.clone() for grad in grads])
        original(weights, grads, *moments, **settings)

    monkeypatch.setattr(projection, "low_rank_adam", spied)
    caplog.set_level(logging.WARNING)

    def clamped(grad):
        return grad.clamp(-1e-3, 1e-3)

    waits = projection.PATIENCE
    optimizer, *_ = trained(side, waits, clamped)
    assert optimizer.refreshes == 0
    assert sum("waits for the next update" in m and "a hook" in m for m in caplog.messages) == 2 * waits
    optimizer, before, delivered = trained(side, waits + 1, clamped)
    assert optimizer.refreshes == 2
    assert sum("refreshed all the same" in message for message in caplog.messages) == 2
    # What was delivered, from the old basis into the new one.
    for (layer, old), low, got in zip(before, delivered, given[-1], strict=True):
        turn = layer.basis.T @ old
        torch.testing.assert_close(got.view_as(low), low @ turn.T if side == "input" else turn @ low)
        assert (layer.basis - old).abs().max() > 1e-2


@pytest.mark.parametrize("asked", ["x", "other", "R"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("side", ["input", "output"])
def test_gradients_that_are_asked_for_between_updates_change_nothing(side, asked, checkpointing):
    """A penalty, or a saliency map; with a micro-batch more in each update, and layers that are used twice."""
    runs = []
    for asks in (False, True):
        torch.manual_seed(0)
        config = {
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
            "megalr": {
                "parametrization": {**PARAMETRIZATION, "update_proj_gap": 3, "side": side, "target_modules": ["0", "2"]}
            },
        }
        model = nn.Sequential(nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 9), nn.LayerNorm(9))
        megalr.parametrize(model, config)
        optimizer = megalr.build_optimizer(model, config)

        def loss(x, model=model):
            y = checkpoint(model, model(x), use_reentrant=False) if checkpointing else model(model(x))
            return y.sub(1).square().sum()

        for _ in range(7):
            optimizer.zero_grad()
            for _ in range(2):
                x = torch.randn(32, 9, requires_grad=True)
                loss(x).backward()
                if asks:
                    torch.autograd.grad(loss(x), {"x": x, "other": model[3].weight, "R": model[0].R}[asked])
            optimizer.step()
        assert optimizer.refreshes >= 4
        runs.append({name: p.detach().clone() for name, p in model.named_parameters()})
    for name, expected in runs[0].items():
        assert torch.equal(runs[1][name], expected), name


def test_a_refresh_goes_on_waiting_after_a_load():
    def clamped(grad):
        return grad.clamp(-1e-3, 1e-3)

    optimizer, *_ = trained("input", projection.PATIENCE, clamped)
    assert optimizer.refreshes == 0
    optimizer, *_ = trained("input", 1, clamped, optimizer.state_dict())
    assert optimizer.refreshes == 2


def test_a_gradient_that_is_scaled_delays_nothing():
    optimizer, *_ = trained("input", 1, lambda grad: 0.125 * grad)
    assert optimizer.refreshes == 2
