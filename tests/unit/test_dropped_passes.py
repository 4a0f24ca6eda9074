"""What backward passes leave in layers belongs to an update: dropped passes leave nothing, others are not lost."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import megalr

SECTIONS = {
    "velora": {"activations": {"type": "velora", "groups": 4, "target_modules": ["mlp"]}},
    "projected": {"parametrization": {"type": "projected", "rank": 3, "update_proj_gap": 2, "target_modules": ["mlp"]}},
}


def round_trip(optimizer, _):
    optimizer.load_state_dict(optimizer.state_dict())  # as accelerate does before the first backward pass


def dropped_pass(optimizer, loss):
    loss(99).backward()
    optimizer.zero_grad()


def dropped_update(optimizer, loss):
    (loss(99) * float("inf")).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize("disturb", [round_trip, dropped_pass, dropped_update])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_training_is_not_disturbed(section, disturb, at):
    expected = train(section, lambda *_: None, at)
    got = train(section, disturb, at)
    assert expected.keys() == got.keys()
    assert [name for name, value in expected.items() if not torch.equal(value, got[name])] == []


def train(section, disturb, at):
    """A plain loop of four updates, disturbed before one of them: the weights."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"mlp": nn.Linear(20, 12), "head": nn.Linear(12, 5)})
    config = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-2}}, "megalr": SECTIONS[section]}
    megalr.parametrize(model, config)
    optimizer = megalr.build_optimizer(model, config)

    def loss(index):
        x = torch.randn(6, 20, generator=torch.Generator().manual_seed(index))
        return model["head"](model["mlp"](x).tanh()).square().mean()

    for index in range(4):
        if index == at:
            disturb(optimizer, loss)
        for passes in range(2):
            loss(2 * index + passes).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.updates == 4
    return {name: value.clone() for name, value in model.state_dict().items()}
