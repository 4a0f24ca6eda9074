"""Checkpoints with valid checksums whose counts or shapes are of no optimizer: refused before anything is loaded."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megalr.checkpoint.schedules import check_schedule, schedule_numbers
from megalr.errors import UserError
from megalr.optim.loading import check_counts, check_matrices, check_moments, check_shapes
from megalr.optim.matrices import Matrix
from megalr.rules.base import tensors_of
from megalr.rules.galore import GaLore
from megalr.rules.q_galore import QGaLore

SHAPE = (12, 32)
NAME = "layers.0.q.weight"


def meta(*shape):
    return torch.empty(shape, device="meta")


def updater(rule):
    """What the check asks of a MatrixUpdater: two matrices, the second one of another rank."""
    matrices = [Matrix(name, SHAPE, rule, owner, 0, 0, everywhere=False) for owner, name in enumerate((NAME, "k"))]
    return SimpleNamespace(matrices=matrices)


def state_of(rule):
    """Numbers and outlines of both matrices."""
    state = rule.init_state(SHAPE, "meta")
    numbers = {key: value for key, value in state.items() if isinstance(value, int)}
    outlines = {f"rule/{name}/{key}": each for name in (NAME, "k") for key, each in tensors_of(state).items()}
    return {NAME: numbers, "k": dict(numbers)}, outlines


def test_what_a_rule_keeps_is_accepted():
    numbers, saved = state_of(GaLore(rank=4))
    check_matrices(updater(GaLore(rank=4)), numbers, saved, converts=False)
    check_matrices(updater(GaLore(rank=4)), {}, {}, converts=False)  # before the first update


@pytest.mark.parametrize("name", [NAME, "k"])
@pytest.mark.parametrize("shape", [(32, 4), (4, 31), (1, 1), (128,), (8, 32), None])
def test_a_state_of_another_shape_is_refused_on_every_rank(name, shape):
    numbers, saved = state_of(GaLore(rank=4))
    key = f"rule/{name}/exp_avg"
    assert tuple(saved.pop(key).shape) == (4, 32)
    if shape is not None:
        saved[key] = meta(*shape)
    with pytest.raises(UserError) as caught:
        check_matrices(updater(GaLore(rank=4)), numbers, saved, converts=False)
    assert f"{key}: {shape or 'none'}, expected (4, 32)" in str(caught.value)


@pytest.mark.parametrize("small", [0, 4096])
@pytest.mark.parametrize("quantizes", [True, False])
def test_what_is_converted_has_the_shapes_of_now(quantizes, small):
    written, now = GaLore(rank=4), QGaLore(rank=4, min_8bit_size=small)
    if not quantizes:
        written, now = now, written
    numbers, saved = state_of(written)
    check_matrices(updater(now), numbers, saved, converts=True)
    numbers, saved = state_of(written)
    saved[f"rule/{NAME}/exp_avg"] = meta(5, 3)
    with pytest.raises(UserError, match=f"{NAME}.*exp_avg"):
        check_matrices(updater(now), numbers, saved, converts=True)


def test_a_state_that_the_numbers_do_not_name_is_refused():
    numbers, saved = state_of(GaLore(rank=4))
    del numbers[NAME]
    with pytest.raises(UserError, match=f"the rule's state of {NAME}, and its numbers.matrices, which has to name"):
        check_matrices(updater(GaLore(rank=4)), numbers, saved, converts=False)


SHAPES = {"embed": (50, 8), "norm": (8,), "stack": (3, 4, 8), "scale": ()}
STORED = {"embed": (50, 8), "norm": (8,), "stack": (12, 8), "scale": (1,)}


def moments(**changes):
    shapes = {f"{kind}/{name}": shape for kind in ("exp_avg", "exp_avg_sq") for name, shape in STORED.items()} | changes
    return {key: meta(*shape) for key, shape in shapes.items() if shape is not None}


def test_moments_have_the_stored_shapes_of_their_parameters():
    layout = SimpleNamespace(shapes=SHAPES)
    check_moments(layout, moments())
    check_moments(layout, {})  # before the first update
    for key, shape in [("embed", (8, 50)), ("embed", (49, 8)), ("norm", (5,)), ("stack", (4, 8)), ("norm", None)]:
        said = rf"exp_avg_sq/{key}: {shape or 'none'}, expected {STORED[key]}"
        with pytest.raises(UserError) as caught:
            check_moments(layout, moments(**{f"exp_avg_sq/{key}": shape}))
        assert said in str(caught.value)


def test_whatever_else_is_read_has_the_saved_shape():
    with pytest.raises(UserError, match=r"directions/q: \(7,\), expected \(8,\)"):
        check_shapes({"directions/q": (8,)}, {"directions/q": meta(7)})


@pytest.mark.parametrize("value", [-1, 40.5, 40.0, "40", True, None, [1]])
@pytest.mark.parametrize("where", ["matrices.q.step", "clocks.dense.count", "clocks.dense.since_reset"])
def test_counts_are_whole_numbers_that_are_not_negative(where, value):
    numbers = {"clocks": {"dense": {"count": 3, "since_reset": None}}, "matrices": {"q": {"step": 3}}}
    check_counts(numbers)
    kind, name, key = where.split(".")
    numbers[kind][name][key] = value
    if value is None and key == "since_reset":
        return check_counts(numbers)
    with pytest.raises(UserError, match="expected a whole number of at least 0") as caught:
        check_counts(numbers)
    assert f"the checkpoint's {where} is {value!r}" in str(caught.value)
    return None


class DeepSpeedSchedule:
    def state_dict(self):
        return {"last_batch_iteration": -1}


@pytest.mark.parametrize("value", ["40", 40.5, -2, None, True])
def test_a_schedules_place_is_a_whole_number(value):
    numbers = schedule_numbers(DeepSpeedSchedule())
    check_schedule(DeepSpeedSchedule(), numbers)
    numbers["state"]["last_batch_iteration"] = value
    with pytest.raises(UserError, match=r"schedule.state.last_batch_iteration is .*, expected a whole number"):
        check_schedule(DeepSpeedSchedule(), numbers)


def test_a_schedules_state_is_of_the_types_that_it_has_now():
    schedule = torch.optim.lr_scheduler.MultiStepLR(torch.optim.SGD([torch.zeros(1)], lr=0.1), [2, 4])
    numbers = schedule_numbers(schedule)
    check_schedule(schedule, numbers)
    for key, value in [("base_lrs", ["0.1"]), ("base_lrs", 0.1), ("gamma", "0.1"), ("milestones", 3)]:
        changed = {**numbers, "state": {**numbers["state"], key: value}}
        with pytest.raises(UserError, match=f"schedule.state.{key} is .*, as MultiStepLR has it"):
            check_schedule(schedule, changed)
