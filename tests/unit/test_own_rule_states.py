"""States of rules that users write: all of a state comes back from a checkpoint, or it is refused while it trains."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

import megalr
from megalr.optim.state import check, entries_of, make_room, numbers_of, settle
from megalr.rules.base import Rule
from tests.registries import forgotten

BEFORE, AFTER = 4, 5  # updates
INF, NAN = float("inf"), float("nan")


@pytest.fixture(autouse=True)
def registries():
    """What a test registers is forgotten after it."""
    with forgotten():
        yield


def trainer(start, change=lambda grad, state: None, factor=lambda state: 1.0, **methods):
    """A model of one linear layer under a rule of one's own: momentum, and what the arguments add.

    Args:
        start: numbers and tensors that the state begins with, beside "m".
        change: what an update does with the gradient and the state.
        factor: what the momentum is multiplied by, of the state.
        methods: others of the rule, or class attributes.
    """

    class Own(Rule):
        name = "own"
        reset_keys = ("m",)

        def init_state(self, shape, device="cpu"):
            given = start(device) if callable(start) else start
            return {"m": torch.zeros(shape, device=device), **given}

        def update(self, grad, state, basis):
            change(grad, state)
            return state["m"].mul_(0.9).add_(grad).clone() * factor(state)

        def state_numel(self, shape):
            return shape[0] * shape[1]

        def flops(self, shape):
            return 6.0 * shape[0] * shape[1]

    rule = type("Own", (Own,), methods)
    with forgotten():
        megalr.register_rule("Own")(dataclasses.dataclass(frozen=True, kw_only=True)(rule))
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5, bias=False))
        optimizer = megalr.build_optimizer(
            model, {"optimizer": {"type": "Own", "params": {"lr": 0.1, "target_modules": ["0"]}}}
        )
    return model, optimizer


def train(model, optimizer, updates, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(updates):
        model[0].weight.grad = torch.randn(5, 6, generator=generator)
        optimizer.step()
    return model[0].weight.detach().clone(), copy.deepcopy(optimizer.matrix_states["0.weight"])


def by_state_dict(make, model, optimizer):
    """Another trainer with what torch's state dict holds of this one."""
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file)
    model, optimizer = make()
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    return model, optimizer


def saved(optimizer):
    """What a checkpoint of megalr holds."""
    tensors = {key: entry.pieces[0].data.clone() for key, entry in entries_of(optimizer, once=True).items()}
    return json.loads(json.dumps(numbers_of(optimizer))), tensors


def loaded(optimizer, numbers, tensors):
    outlines = {key: torch.empty_like(value, device="meta") for key, value in tensors.items()}
    assert check(optimizer, numbers, outlines) == ""
    make_room(optimizer, numbers, outlines)
    for key, entry in entries_of(optimizer, once=False).items():
        entry.pieces[0].data.copy_(tensors[key])
    settle(optimizer, numbers)


def by_checkpoint(make, model, optimizer):
    """The same by numbers and tensors of megalr's checkpoints."""
    content = saved(optimizer)
    model, optimizer = make()
    loaded(optimizer, *content)
    return model, optimizer


def power(grad, state):
    state["pow"] *= 0.9


def everything(grad, state):
    state["pow"] *= 0.9
    state["odd"] = not state["odd"]
    state["last"] -= 1
    state["large"] *= 10**30 + 7
    state["least"] = min(state["least"], float(grad.abs().max())) if state["last"] < -6 else state["least"]
    state["count"] = state.get("count", 0) + 1  # a number that comes with the first update
    state["whole"] += 0.25  # a whole number that is none any more


KINDS = {"pow": 1.0, "odd": False, "last": -1, "large": 3, "least": INF, "whole": 1, "tiny": 5e-324, "third": 1 / 3}
STATES = {
    "float": ({"pow": 1.0}, power, lambda state: 1 / (1 - state["pow"])),
    "negative": ({"last": -1}, lambda grad, state: None, lambda state: 1 + state["last"] / 2),
    "all": (KINDS, everything, lambda state: (1 + state["odd"]) * state["pow"] + state["count"]),
}


@pytest.mark.parametrize("way", [by_state_dict, by_checkpoint])
@pytest.mark.parametrize("kind", STATES)
def test_numbers_of_every_kind_come_back_to_the_bit(kind, way):
    def make():
        return trainer(*STATES[kind])

    model, optimizer = make()
    train(model, optimizer, BEFORE)
    again = way(make, model, optimizer)
    weight, state = train(model, optimizer, AFTER, seed=1)
    same, loaded_state = train(*again, AFTER, seed=1)
    assert torch.equal(weight, same)
    numbers, others = ({k: v for k, v in s.items() if k != "m"} for s in (state, loaded_state))
    assert numbers == others and all(type(numbers[key]) is type(others[key]) for key in numbers)


def test_a_reset_leaves_numbers_of_their_type():
    _, optimizer = made = trainer({"pow": 1.0, "odd": True}, power, reset_keys=("m", "pow", "odd"))
    train(*made, 2)
    optimizer.matrices.reset(["0.weight"])
    numbers = optimizer.matrices.numbers()["0.weight"]
    assert numbers == {"pow": 0.0, "odd": False} and {*map(type, numbers.values())} == {float, bool}


class Odd:
    """Of no type that JSON has."""


@pytest.mark.parametrize(
    ("start", "words"),
    [
        ({"x": None}, '"x" a builtins.NoneType, which checkpoints do not hold'),
        ({"x": [1.0, 2.0]}, '"x" a builtins.list'),
        ({"x": {"y": 1}}, '"x" a builtins.dict'),
        ({"x": "text"}, '"x" a builtins.str'),
        ({"x": np.float64(1)}, '"x" a numpy.float64'),
        ({"x": np.int64(1)}, '"x" a numpy.int64'),
        ({"x": Odd()}, '"x" a .*Odd'),
        ({"x": NAN}, '"x" NaN'),
        ({"a/b": 1}, "the key 'a/b', which checkpoints cannot hold: write a name without a slash"),
        ({0: 1}, "the key 0"),
        (lambda device: {"x": float(torch.ones(1, device=device))}, 'fails on the device "meta"'),
    ],
)
def test_what_a_checkpoint_cannot_hold_is_refused_before_the_first_update(start, words):
    model, optimizer = trainer(start)
    before = model[0].weight.detach().clone()
    with pytest.raises(megalr.UserError, match=f"init_state of Own (makes )?{words}"):
        train(model, optimizer, 1)
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("value", [INF, -INF, NAN])
def test_tensors_begin_with_what_a_load_takes_up(value):
    made = trainer(lambda device: {"least": torch.full((), value, device=device)})
    with pytest.raises(megalr.UserError, match='init_state of Own makes "least" with values that are not finite'):
        train(*made, 1)


def set_late(value, updates=3):
    """A change that puts a value into the state, not at the first update."""

    def change(grad, state):
        state["n"] += 1
        if state["n"] == updates:
            state["x"] = value

    return change


@pytest.mark.parametrize(
    ("first", "value", "words"),
    [
        ({}, torch.zeros(2, 3), r'"x" .* a tensor \(2, 3\) of float32; before it was not there'),
        ({"x": 0.0}, torch.ones(()), r'"x" .* a tensor \(\) of float32; before it was a number.*; .item\(\) makes'),
        ({"x": torch.zeros(3)}, 0.5, r'"x" .* the number 0.5; before it was a tensor \(3,\) of float32'),
        ({"x": torch.zeros(3)}, torch.zeros(4), r'"x" .* a tensor \(4,\) of float32; before it was a tensor \(3,\)'),
        ({"x": torch.zeros(3)}, torch.zeros(3).double(), r'"x" .* of float64; before .* of float32'),
        ({"x": 0.0}, NAN, '"x" NaN'),
        ({"x": 0.0}, np.float64(0.5), '"x" a numpy.float64'),
        ({"x": 0.0}, None, '"x" a builtins.NoneType'),
        ({}, [1], '"x" a builtins.list'),
    ],
)
def test_what_a_checkpoint_would_lose_is_refused_at_the_update_that_makes_it(first, value, words):
    model, optimizer = trainer({"n": 0, **first}, set_late(value))
    train(model, optimizer, 2)
    with pytest.raises(megalr.UserError, match=f"the update of Own.*{words}") as caught:
        train(model, optimizer, 1)
    assert "0.weight" in str(caught.value)


def test_a_key_that_an_update_removes_is_refused():
    made = trainer({"x": 0.5}, lambda grad, state: state.pop("x"))
    with pytest.raises(megalr.UserError, match='the update of Own has removed "x" from the state of 0.weight'):
        train(*made, 1)


def test_saved_tensors_that_the_rule_has_no_place_for_are_refused_by_key():
    model, optimizer = trainer(lambda device: {"old": torch.zeros(3, device=device)})
    train(model, optimizer, 2)
    words = "the checkpoint has rule/0.weight/old, for which the rule own has no place: its init_state has to make"
    for way in (by_checkpoint, by_state_dict):
        with pytest.raises(megalr.UserError, match=words):
            train(*way(lambda: trainer({}), model, optimizer), 1)


def test_numbers_that_a_checkpoint_lacks_are_refused_by_key():
    """As those of megalr that kept only whole numbers do."""
    model, optimizer = trainer({})
    train(model, optimizer, 2)
    words = 'lacks "pow" in the state of 0.weight, which the rule own would begin anew: .* override room'
    for way in (by_checkpoint, by_state_dict):
        with pytest.raises(megalr.UserError, match=words):
            train(*way(lambda: trainer({"pow": 1.0}, power), model, optimizer), 1)


def test_a_rule_can_go_on_from_states_without_a_number():
    """As the message says."""
    model, optimizer = trainer({})
    train(model, optimizer, 2)

    def room(self, numbers, shape, device):
        state = self.init_state(shape, device)
        del state["pow"]
        return state | dict(numbers)

    def change(grad, state):
        state["pow"] = 0.9 * state.get("pow", 0.81)

    def make():
        return trainer({"pow": 1.0}, change, room=room)

    for way in (by_checkpoint, by_state_dict):
        again = way(make, model, optimizer)
        _, state = train(*again, 1)
        assert state["pow"] == 0.9 * 0.81
        train(*way(make, *again), 1)


@pytest.mark.parametrize("value", ["0.9", None, [1], {"a": 1}, NAN])
def test_a_saved_number_that_is_none_is_refused(value):
    made = trainer({"pow": 1.0}, power)
    train(*made, 2)
    numbers, tensors = saved(made[1])
    numbers["matrices"]["0.weight"]["pow"] = value
    weight, state = made[0][0].weight.detach().clone(), copy.deepcopy(made[1].matrix_states["0.weight"])
    with pytest.raises(megalr.UserError, match=r"matrices.0.weight.pow, of the rule own, is .*, expected a number"):
        loaded(made[1], numbers, tensors)
    assert torch.equal(made[0][0].weight, weight) and made[1].matrix_states["0.weight"]["pow"] == state["pow"]


@pytest.mark.parametrize("value", [-1, 40.5, True, "3", NAN, INF])
def test_counts_of_megalrs_rules_stay_whole_numbers(value):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5, bias=False))
    config = {"optimizer": {"type": "AdamMini", "params": {"lr": 0.1, "target_modules": ["0"]}}}
    optimizer = megalr.build_optimizer(model, config)
    train(model, optimizer, 2)
    numbers, tensors = saved(optimizer)
    loaded(optimizer, numbers, tensors)
    numbers["matrices"]["0.weight"]["step"] = value
    with pytest.raises(megalr.UserError, match="step is .*, expected a whole number of at least 0"):
        loaded(optimizer, numbers, tensors)
    del numbers["matrices"]["0.weight"]["step"]
    with pytest.raises(megalr.UserError, match='lacks "step" in the state of 0.weight'):
        loaded(optimizer, numbers, tensors)


def test_infinite_numbers_are_loaded():
    made = trainer({"least": INF, "most": -INF})
    train(*made, 1)
    _, optimizer = by_checkpoint(lambda: trainer({"least": 0.0, "most": 0.0}), *made)
    state = optimizer.matrix_states["0.weight"]
    assert (state["least"], state["most"]) == (math.inf, -math.inf)
