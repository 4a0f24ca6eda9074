"""What events of a user's layers keep: it comes back from a checkpoint, or is refused by its name."""

from __future__ import annotations

import copy
import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import megalr
from megalr.checkpoint.loading import _refuse_untaken
from megalr.layers.relora import ReloraConfig
from megalr.layout.rectangles import Entry
from megalr.optim.events.base import LayerEvents
from megalr.optim.events.relora import Merges
from megalr.optim.state import event_numbers, load_event_numbers
from tests.registries import forgotten

NUMBERS = {"power": 0.1 + 0.2, "odd": True, "last": -1, "least": float("inf"), "large": 10**40, "none": None, "by": {}}


def trainer(given, **methods):
    """A model of one layer under ReLoRA, with events that also return these numbers, and have these methods."""

    class Counted(Merges):
        def numbers(self):
            return super().numbers() | self.own

        def load_numbers(self, numbers):
            super().load_numbers(numbers)
            self.own = {key: value for key, value in numbers.items() if key != "merges"}

        own = copy.deepcopy(given)

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class OwnRelora(ReloraConfig):
        """ReLoRA under another name."""

    with forgotten():
        megalr.register_parametrization("counted_relora")(OwnRelora)
        megalr.register_events(OwnRelora)(type("Counted", (Counted,), methods))
        section = {
            "type": "counted_relora",
            "rank": 3,
            "merge_every": 2,
            "restart_warmup_steps": 1,
            "target_modules": ["attn"],
        }
        content = {"megalr": {"parametrization": section}}
        torch.manual_seed(0)
        model = megalr.parametrize(nn.ModuleDict({"attn": nn.Linear(6, 5)}), content)
        return model, megalr.build_optimizer(model, content)


def step(model, optimizer):
    model["attn"](torch.randn(4, 6)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_numbers_of_every_kind_come_back():
    _, optimizer = made = trainer(NUMBERS)
    step(*made)
    numbers = event_numbers(optimizer)
    _, again = trainer({})
    load_event_numbers(again, json.loads(json.dumps(numbers)))
    assert again.layer_events.own == NUMBERS
    assert [*map(type, again.layer_events.own.values())] == [*map(type, NUMBERS.values())]


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ({"x": torch.ones(2)}, "a Tensor as x"),
        ({"x": {1, 2}}, "a set as x"),
        ({"x": [{"y": object()}]}, r"a object as x\[0\].y"),
        ({"x": {0: 1.0}}, "the key 0 in x"),
        ({3: 1.0}, "the key 3, which"),
    ],
)
def test_what_json_cannot_hold_is_refused_before_the_first_update(numbers, words):
    model, optimizer = trainer(numbers)
    before = model["attn"].B.detach().clone()
    with pytest.raises(megalr.UserError, match=rf"Counted.numbers\(\) returns {words}"):
        step(model, optimizer)
    assert torch.equal(model["attn"].B, before)


def late(**numbers):
    """An update that adds numbers."""

    def end_update(self, updates):
        self.own = numbers
        return []

    return end_update


def test_what_comes_later_is_refused_when_it_is_saved():
    model, optimizer = trainer({}, end_update=late(x=torch.ones(1)))
    step(model, optimizer)
    with pytest.raises(megalr.UserError, match=r"Counted.numbers\(\) returns a Tensor as x"):
        optimizer.state_dict()


def kept(self):
    return {"mine/attn": Entry.of(torch.ones(3))} if self.made else {}


def test_tensors_that_make_room_leaves_out_are_refused_by_key():
    words = "mine/attn, for which the layers' events prepare nothing: make_room"
    model, optimizer = trainer({}, entries=kept)
    for _ in range(2):
        step(model, optimizer)
    state = optimizer.state_dict()
    assert "mine/attn" in state["megalr"]["tensors"]
    made = trainer({}, entries=lambda self: {})
    made[1].load_state_dict(state)
    with pytest.raises(megalr.UserError, match=words):
        step(*made)
    saved = {"mine/attn": None, "weights/attn.B": None, "remainders/attn": None}
    with pytest.raises(megalr.UserError, match=words):
        _refuse_untaken(SimpleNamespace(targets=dict), saved, None)
    _refuse_untaken(SimpleNamespace(targets=lambda: {"mine/attn": None}), saved, None)


class Minimal(LayerEvents):
    """No more than what a subclass has to define."""

    def __init__(self, layers, config, seed):
        self.count = 0

    def end_update(self, updates):
        self.count += 1
        return []

    def numbers(self):
        return {"count": self.count}

    def load_numbers(self, numbers):
        self.count = numbers["count"]


def test_required_methods_are_enough():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Own(ReloraConfig):
        """ReLoRA's layers with other events."""

    def build():
        torch.manual_seed(0)
        model = megalr.parametrize(nn.ModuleDict({"attn": nn.Linear(6, 5)}), content)
        return model, megalr.build_optimizer(model, content)

    with forgotten():
        megalr.register_parametrization("own")(Own)
        megalr.register_events(Own)(Minimal)
        section = {"type": "own", "rank": 3, "merge_every": 2, "restart_warmup_steps": 1, "target_modules": ["attn"]}
        content = {"megalr": {"parametrization": section}}
        made, again = build(), build()
        step(*made)
        again[1].load_state_dict(copy.deepcopy(made[1].state_dict()))
        step(*again)
    assert again[1].layer_events.count == 2
