"""A learning-rate schedule's state as JSON has it, and whether a schedule of now can go on from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megalr.errors import UserError
from megalr.hosts.deepspeed import POSITION

ITEMS = "(items)"  # of a dictionary whose keys are not all strings, which JSON's have to be

# Where schedules say how far they are, DeepSpeed's and torch's, and the least number: that of before the first step.
PLACES = {POSITION: -1, "last_epoch": -1, "_step_count": 0}


def schedule_numbers(schedule: Any) -> dict[str, Any] | None:
    """A schedule's class and state; None for no schedule.

    Raises:
        UserError: JSON cannot hold its state.
    """
    if schedule is None:
        return None
    name = type(schedule).__name__
    return {"type": name, "state": {key: _plain(value, f"{name}.{key}") for key, value in _state(schedule).items()}}


def goes_on(schedule: Any, numbers: Mapping[str, Any] | None, *, same_groups: bool) -> bool:
    """Whether a schedule has a use for a saved state: there is neither, or it can go on from there.

    DeepSpeed's schedules can go on from each other's, which say where they are. Each of torch's has a state of its own
    kind, with the rates of every group in it.

    Args:
        schedule: of now.
        numbers: of :func:`schedule_numbers`.
        same_groups: whether the optimizer's groups are those that the state was saved of.
    """
    if schedule is None or numbers is None:
        return schedule is None and numbers is None
    keys = _state(schedule).keys()
    if keys != numbers["state"].keys():
        return False
    return keys == {POSITION} or (type(schedule).__name__ == numbers["type"] and same_groups)


def check_schedule(schedule: Any, numbers: Mapping[str, Any]) -> None:
    """Make sure that the state of a schedule that :func:`goes_on` is of the types that the schedule's own is of.

    Raises:
        UserError: it is not, and the schedule would fail at its next step.
    """
    for key, own in _state(schedule).items():
        value = numbers["state"][key]
        if key in PLACES:
            if type(value) is not int or value < PLACES[key]:
                raise UserError(
                    f"the checkpoint's schedule.state.{key} is {value!r}, expected a whole number of at least "
                    f"{PLACES[key]}: load another checkpoint"
                )
        elif not _alike(value, own):
            raise UserError(
                f"the checkpoint's schedule.state.{key} is {value!r}, expected a {type(own).__name__}, as "
                f"{type(schedule).__name__} has it: load another checkpoint"
            )


def set_schedule(schedule: Any, numbers: Mapping[str, Any], *, same_groups: bool) -> None:
    """Take over what :func:`schedule_numbers` gave of a schedule that :func:`goes_on`."""
    now = _state(schedule)
    schedule.load_state_dict({key: _revived(value, now[key]) for key, value in numbers["state"].items()})
    if not same_groups:
        schedule.step(numbers["state"][POSITION])  # so that groups have the rates of there before the next update


def _state(schedule: Any) -> dict[str, Any]:
    state: dict[str, Any] = schedule.state_dict()
    return state


def _alike(saved: Any, own: Any) -> bool:
    """Whether a saved value is of the kind of a schedule's own; None, for nothing yet, goes with everything."""
    if saved is None or own is None:
        return True
    if isinstance(own, list | tuple):
        several = zip(saved, own, strict=False) if isinstance(saved, list) else ()
        return isinstance(saved, list) and all(_alike(*each) for each in several)
    if isinstance(own, Mapping):
        return isinstance(saved, dict)
    for kind in (bool, str):
        if isinstance(own, kind) or isinstance(saved, kind):
            return isinstance(own, kind) and isinstance(saved, kind)
    return isinstance(saved, int | float)  # a time may be whole or not


def _plain(value: Any, where: str) -> Any:
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value) and ITEMS not in value:
            return {key: _plain(each, f"{where}.{key}") for key, each in value.items()}
        return {ITEMS: [[_plain(key, where), _plain(each, f"{where}[{key}]")] for key, each in value.items()]}
    if isinstance(value, list | tuple):
        return [_plain(each, where) for each in value]
    if value is None or isinstance(value, str | int | float):  # of numpy's numbers those that are Python's, too
        return value
    raise UserError(
        f"the learning-rate schedule's {where} is a {type(value).__name__}, which JSON cannot hold: give the schedule "
        "a state_dict of numbers and strings"
    )


def _revived(saved: Any, like: Any) -> Any:
    """What was saved, in the type that a schedule has it in now: a Counter is more than a dictionary."""
    if isinstance(saved, list):
        likes = like if isinstance(like, list | tuple) and len(like) == len(saved) else [None] * len(saved)
        several = [_revived(each, its_like) for each, its_like in zip(saved, likes, strict=True)]
        return tuple(several) if isinstance(like, tuple) else several
    if not isinstance(saved, dict):
        return saved
    items = saved[ITEMS] if ITEMS in saved else list(saved.items())
    known = like if isinstance(like, Mapping) else {}
    revived = {_hashable(key): _revived(value, known.get(_hashable(key))) for key, value in items}
    return type(like)(revived) if isinstance(like, dict) else revived


def _hashable(key: Any) -> Any:
    return tuple(key) if isinstance(key, list) else key
