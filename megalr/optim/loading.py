"""Saved counts and shapes against those that an optimizer can go on from: checksums say that nothing was damaged, not
that it fits. Torch reads what overlaps, so that a tensor of another shape would be taken over in part.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from megalr.errors import UserError, some_of
from megalr.layout.rectangles import folded
from megalr.rules.base import State, tensors_of
from megalr.rules.states import NUMBERS, check_numbers

if TYPE_CHECKING:
    from megalr.layout.layout import Layout
    from megalr.optim.matrices import Matrix, MatrixUpdater

MOMENTS = ("exp_avg", "exp_avg_sq")
ADVICE = "megalr did not write it so: load another checkpoint"

Shapes = dict[str, tuple[int, ...]]


def check_counts(numbers: Mapping[str, Any], *, own: Collection[str] = ()) -> None:
    """Make sure that what counts updates is a whole number, and not negative.

    Args:
        numbers: of the optimizer, with "clocks" and the "matrices" of all ranks.
        own: matrices that a user's rule updates, whose numbers need not count anything.

    Raises:
        UserError: some count is something else.
    """
    for where, value in _counts(numbers, own):
        if type(value) is not int or value < 0:  # true is no number
            raise UserError(f"the checkpoint's {where} is {value!r}, expected a whole number of at least 0: {ADVICE}")


def changed_by_json(value: Any, where: str = "") -> str:
    """What of a value JSON would not give back, in words; empty if nothing. Of a tuple it makes a list.

    Args:
        value: of any type.
        where: it lies, for the words.
    """
    inner: Iterable[tuple[str, Any]] = ()
    if isinstance(value, dict):
        odd = [key for key in value if not isinstance(key, str)]
        if odd:
            return f"the key {odd[0]!r}{where and f' in {where}'}"
        inner = ((f"{where}.{key}".lstrip("."), each) for key, each in value.items())
    elif isinstance(value, list | tuple):
        inner = ((f"{where}[{index}]", each) for index, each in enumerate(value))
    elif value is not None and not isinstance(value, (str, *NUMBERS)):
        return f"a {type(value).__qualname__}{where and f' as {where}'}"
    return next(filter(None, (changed_by_json(each, place) for place, each in inner)), "")


def check_moments(layout: Layout, saved: Mapping[str, Tensor]) -> None:
    """Make sure that AdamW's moments have the shapes of their parameters, and that there are both or none.

    Args:
        layout: of all trained parameters.
        saved: tensors on the meta device, by key, of all ranks.

    Raises:
        UserError: they have not.
    """
    expected: Shapes = {}
    for name, shape in layout.shapes.items():
        keys = [f"{kind}/{name}" for kind in MOMENTS]
        if any(key in saved for key in keys):
            expected |= dict.fromkeys(keys, folded(shape))
    check_shapes(expected, saved)


def check_matrices(
    updater: MatrixUpdater, numbers: Mapping[str, Mapping[str, float]], saved: Mapping[str, Tensor], *, converts: bool
) -> None:
    """Make sure that the states of rules are complete, and of the shapes that the rules keep; those of all ranks.

    Args:
        updater: of the matrices.
        numbers: of all matrices that have a state.
        saved: tensors on the meta device, by key, of all ranks.
        converts: the states are of another form of the rules, which is then looked at once they are converted.

    Raises:
        UserError: they are not.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for entry, outline in saved.items():
        kind, _, place = entry.partition("/")
        if kind == "rule":
            name, _, key = place.rpartition("/")
            found.setdefault(name, {})[key] = outline
    unnamed = [name for name in found if name not in numbers]
    if unnamed:
        raise UserError(
            f"the checkpoint has the rule's state of {some_of(unnamed)}, and its numbers.matrices, which has to name "
            f"every matrix with a state, does not: {ADVICE}"
        )
    expected: Shapes = {}
    for matrix in updater.matrices:
        if matrix.name not in numbers:
            continue
        own = numbers[matrix.name]
        if converts:
            _check_conversion(matrix, own, found.get(matrix.name, {}))
        else:
            room = matrix.rule.room(own, matrix.shape, "meta")
            check_keys(matrix, own, found.get(matrix.name, {}), room)
            outlines = tensors_of(room).items()
            expected |= {f"rule/{matrix.name}/{key}": folded(tuple(each.shape)) for key, each in outlines}
    check_shapes(expected, saved)


def check_keys(matrix: Matrix, numbers: Mapping[str, float], tensors: Collection[str], room: State) -> None:
    """Make sure that a rule takes up all of a matrix's saved state, and begins with nothing of its own.

    Args:
        matrix: that has the state.
        numbers: the saved ones.
        tensors: keys of the saved ones; those that are missing are for :func:`check_shapes` to say.
        room: of the rule, for these numbers.

    Raises:
        UserError: the rule has no place for a tensor, a number is missing, or is none.
    """
    check_numbers(matrix.rule, matrix.name, dict(numbers))
    unknown = sorted(set(tensors) - tensors_of(room).keys())
    if unknown:
        raise UserError(
            f"the checkpoint has rule/{matrix.name}/{unknown[0]}, for which the rule {matrix.rule.name} has no place: "
            "its init_state has to make every key of the state. Load it with the rule that wrote it, or another "
            "checkpoint"
        )
    missing = [key for key, value in room.items() if not isinstance(value, Tensor) and key not in numbers]
    if missing:
        raise UserError(
            f'the checkpoint lacks "{missing[0]}" in the state of {matrix.name}, which the rule {matrix.rule.name} '
            "would begin anew: another version of the rule wrote it, or one of megalr that kept only whole numbers. "
            "Load another checkpoint, or override room() of the rule to leave out the key and have update() make it"
        )


def check_shapes(expected: Shapes, saved: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are not there, or are of other shapes than those that are to be read.

    Raises:
        UserError: which, with both shapes.
    """
    theirs = {key: tuple(saved[key].shape) if key in saved else "none" for key in expected}
    wrong = [f"{key}: {theirs[key]}, expected {shape}" for key, shape in expected.items() if theirs[key] != shape]
    if wrong:
        raise UserError(
            "the checkpoint has tensors of other shapes than the optimizer keeps:\n  "
            + some_of(wrong, 5, "\n  ")
            + f"\n{ADVICE}"
        )


def _check_conversion(matrix: Matrix, numbers: Mapping[str, float], found: Mapping[str, Tensor]) -> None:
    """Convert outlines: what the rule makes of them has to have the shapes of its own states."""
    try:
        made = tensors_of(matrix.rule.convert({**numbers, **found}, matrix.shape))
    except NotImplementedError:
        return  # a conversion that looks at values
    except (RuntimeError, KeyError) as error:
        shapes = ", ".join(f"rule/{matrix.name}/{key}: {tuple(each.shape)}" for key, each in found.items())
        raise UserError(
            f"the checkpoint's state of {matrix.name} ({shapes or 'no tensors'}) cannot be converted to what the rule "
            f"{matrix.rule.name} keeps of a matrix of the shape {matrix.shape} ({error}): {ADVICE}"
        ) from error
    outlines = tensors_of(matrix.rule.init_state(matrix.shape, "meta"))
    own = {f"rule/{matrix.name}/{key}": tuple(each.shape) for key, each in outlines.items()}
    check_shapes(own, {f"rule/{matrix.name}/{key}": each for key, each in made.items()})


def _counts(numbers: Mapping[str, Any], own: Collection[str]) -> Iterator[tuple[str, Any]]:
    for name, clock in numbers["clocks"].items():
        for key, value in clock.items():
            if key != "since_reset" or value is not None:
                yield f"clocks.{name}.{key}", value
    for name, state in numbers["matrices"].items():
        if name in own:
            continue
        yield from ((f"matrices.{name}.{key}", value) for key, value in state.items())
