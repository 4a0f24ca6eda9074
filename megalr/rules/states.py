"""What a rule may keep of a matrix, so that every checkpoint holds all of it: rules of one's own may keep anything.

A checkpoint is read into what :meth:`~megalr.rules.base.Rule.init_state` makes, with the saved numbers in it. So a
tensor that only an update makes would be lost; it is refused when it is made, and not when it is missed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megalr.errors import UserError
from megalr.rules.base import Rule, Shape, State, tensors_of

NUMBERS = (int, float, bool)  # exactly: numpy's are not what comes back
#: Shape and dtype of a state's tensors, by key; None for a number.
Outline = dict[str, tuple[torch.Size, torch.dtype] | None]


def is_of_megalr(rule: Rule) -> bool:
    """Whether a rule is of this package, which keeps no other numbers than counts."""
    return type(rule).__module__.partition(".")[0] == "megalr"


def outline_of(state: State) -> Outline:
    """What a later state of the same matrix is compared with, by :func:`check_updated`."""
    return {key: (value.shape, value.dtype) if isinstance(value, Tensor) else None for key, value in state.items()}


def check_rule(rule: Rule, shape: Shape) -> None:
    """Make sure that checkpoints can hold what a rule keeps of an m x n matrix; alike on all ranks.

    Args:
        rule: any.
        shape: (m, n).

    Raises:
        UserError: ``init_state`` makes something else than tensors and numbers, or nothing on the meta device.
    """
    who = f"init_state of {type(rule).__name__}"
    try:
        state = rule.init_state(shape, "meta")
    except (RuntimeError, NotImplementedError) as error:
        raise UserError(
            f'{who} fails on the device "meta", by which megalr learns shapes without memory ({error}): make tensors '
            "on the device that is given, and do not read their values"
        ) from error
    for key, value in state.items():
        if not isinstance(key, str) or "/" in key:
            raise UserError(f"{who} makes the key {key!r}, which checkpoints cannot hold: write a name without a slash")
        _check_value(who, key, value)


def check_finite(rule: Rule, state: State) -> None:
    """Make sure that a load would take up the tensors that a rule begins with.

    Args:
        rule: whose :meth:`~megalr.rules.base.Rule.init_state` has made the state.
        state: of any matrix.

    Raises:
        UserError: one has NaN or an infinity.
    """
    for key, value in tensors_of(state).items():
        if value.is_floating_point() and value.numel() and not all(map(math.isfinite, map(float, value.aminmax()))):
            raise UserError(
                f'init_state of {type(rule).__name__} makes "{key}" with values that are not finite, from which no '
                "checkpoint is loaded: write finite ones, or keep a number, which may be infinite"
            )


def check_updated(rule: Rule, name: str, before: Outline, state: State) -> None:
    """Make sure that a checkpoint would give back a state as an update has left it.

    Args:
        rule: that has updated it.
        name: of the matrix.
        before: the state's outline when it was made or loaded.
        state: the state now.

    Raises:
        UserError: a key is gone, a tensor is new or of another shape or dtype, or a value is of another kind.
    """
    for key, value in state.items():
        if _is_number(value) and before.get(key) is None:
            continue  # also a number that is new: numbers are loaded whatever init_state makes
        if not isinstance(value, Tensor):
            _check_value(f"the update of {type(rule).__name__}, of {name},", key, value)
        elif before.get(key) == (value.shape, value.dtype):
            continue
        raise UserError(
            f'the update of {type(rule).__name__} has made "{key}" in the state of {name} {_words(value)}; before it '
            f"was {_former(before, key)}. A checkpoint would lose that: init_state has to make every key, with the "
            "shape and dtype that it keeps" + _advice(before, key, value)
        )
    gone = before.keys() - state.keys()
    if gone:
        raise UserError(
            f'the update of {type(rule).__name__} has removed "{min(gone)}" from the state of {name}: keep every key '
            "of init_state, by which a checkpoint is loaded"
        )


def check_numbers(rule: Rule, name: str, numbers: State) -> None:
    """Make sure that saved numbers are numbers.

    Args:
        rule: of the matrix.
        name: of the matrix.
        numbers: of its state, by key.

    Raises:
        UserError: they are not.
    """
    for key, value in numbers.items():
        if not _is_number(value):
            raise UserError(
                f"the checkpoint's matrices.{name}.{key}, of the rule {rule.name}, is {value!r}, expected a number, "
                "true or false: load another checkpoint"
            )


def _check_value(who: str, key: str, value: object) -> None:
    """Refuse what is neither a tensor nor a number; NaN is none."""
    if isinstance(value, Tensor):
        return
    kind = type(value)
    if kind not in NUMBERS:
        raise UserError(
            f'{who} makes "{key}" a {kind.__module__}.{kind.__qualname__}, which checkpoints do not hold: a state has '
            "tensors, int, float and bool"
        )
    if not _is_number(value):
        raise UserError(f'{who} makes "{key}" NaN, from which no checkpoint is loaded: write another number')


def _is_number(value: object) -> bool:
    """NaN is none."""
    return type(value) in NUMBERS and not (isinstance(value, float) and math.isnan(value))


def _words(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    return f"the number {value!r}"


def _former(before: Outline, key: str) -> str:
    if key not in before:
        return "not there"
    made = before[key]
    return "a number" if made is None else f"a tensor {tuple(made[0])} of {str(made[1]).removeprefix('torch.')}"


def _advice(before: Outline, key: str, value: object) -> str:
    is_scalar = isinstance(value, Tensor) and value.numel() == 1
    return "; .item() makes a number of the tensor" if is_scalar and before.get(key, 0) is None else ""
