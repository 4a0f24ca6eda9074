"""An optimizer's state as numbers and rectangles of logical tensors, which belong to no layout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from megalr.errors import UserError
from megalr.layout.rectangles import Entry, entry_of
from megalr.optim.clock import Clock
from megalr.optim.events.base import LayerEvents
from megalr.optim.forms import changed_settings, in_words, layer_form, logical_form, rule_form, rule_settings
from megalr.optim.loading import MOMENTS, changed_by_json, check_counts, check_matrices, check_moments
from megalr.rules.states import is_of_megalr

if TYPE_CHECKING:
    from megalr.optim.optimizer import MegalrOptimizer

SHOWN = 3  # names in a message


def numbers_of(optimizer: MegalrOptimizer) -> dict[str, Any]:
    """Counts, clocks, learning rates and forms, as JSON has them; the same on every rank but for "matrices".

    There each rank has those of its own; all of them together are what :func:`make_room` wants.

    Raises:
        UserError: tensor-parallel ranks update matrices on their own.
    """
    _refuse_parts(optimizer)
    return {
        **optimizer.counts(),
        "lr": {group["name"]: float(group["lr"]) for group in optimizer.all_groups},
        "rule": rule_form(optimizer.config),
        "logical_rule": logical_form(optimizer.config),
        "settings": rule_settings(optimizer.config),
        "by_rule": _by_rule(optimizer),
        "layers": layer_form(optimizer.config),
        "events": event_numbers(optimizer),
        "matrices": {} if optimizer.matrices is None else optimizer.matrices.numbers(),
    }


def entries_of(optimizer: MegalrOptimizer, *, once: bool) -> dict[str, Entry]:
    """The masters, moments and states of this rank, by key; views of what the optimizer works on.

    Args:
        optimizer: after :func:`make_room`, if they are to be read into.
        once: to be written: what other ranks have as well is left out, where it is cut in another way there.
    """
    shard = optimizer.prepare()
    fields = {"weights": shard.buffers, **{key: optimizer.moments(key) for key in MOMENTS}}
    found: dict[str, Entry] = {}
    for kind, field in fields.items():
        for name in shard.layout.shapes:
            if field[shard.layout.of(name)[0].buffer].numel():
                entry = entry_of(name, shard.layout, shard.rank, field, once=once)
                found |= {} if entry is None else {f"{kind}/{name}": entry}
    return found | kept_entries(optimizer)


def kept_entries(optimizer: MegalrOptimizer) -> dict[str, Entry]:
    """Those of rules and events alone."""
    found = {} if optimizer.matrices is None else optimizer.matrices.entries()
    for event in optimizer.events:
        found |= event.entries()
    return found


def event_numbers(optimizer: MegalrOptimizer) -> dict[str, Any]:
    """The counts of the events that layers have.

    Raises:
        UserError: they are not what JSON can hold.
    """
    found = {events.key: events.numbers() for events in _of_layers(optimizer)}
    for events in _of_layers(optimizer):
        changed = changed_by_json(found[events.key])
        if changed:
            raise UserError(
                f"{type(events).__name__}.numbers() returns {changed}, which a checkpoint would give back as something "
                "else, or not at all: return dictionaries with strings as keys, lists, strings, int, float, bool and "
                "None; tensors belong into entries()"
            )
    return found


def load_event_numbers(optimizer: MegalrOptimizer, numbers: Mapping[str, Any]) -> None:
    """Take over what :func:`event_numbers` gave."""
    for events in _of_layers(optimizer):
        events.load_numbers(numbers[events.key])


def check(optimizer: MegalrOptimizer, numbers: Mapping[str, Any], saved: Mapping[str, Tensor]) -> str:
    """Make sure that an optimizer can go on from saved numbers; alike on all ranks, and nothing is changed.

    Args:
        optimizer: before or after updates.
        numbers: of :func:`numbers_of`, with the matrices of all ranks.
        saved: tensors on the meta device, by the keys of :func:`entries_of`, of all ranks.

    Returns:
        What of the saved state this optimizer has no use for, in words for the reader; empty if it has all.

    Raises:
        UserError: the state is of another parametrization, of a rule for other parameters, or of another rule where
            layers keep more than weights; or it has counts or shapes that no optimizer of this configuration has.
    """
    _refuse_parts(optimizer)
    layers, rule = layer_form(optimizer.config), rule_form(optimizer.config)
    begins_anew = numbers["logical_rule"] != logical_form(optimizer.config)
    if numbers["layers"] != layers or (begins_anew and _of_layers(optimizer)):
        before, now = numbers["rule"] | numbers["layers"], rule | layers
        raise UserError(
            f"the checkpoint was written with {in_words(before)}, the configuration has {in_words(now)}: resume with "
            "the settings that it was written with"
        )
    if begins_anew:
        return f"moments and states of {in_words(numbers['rule'])}"
    others = sorted({*numbers["by_rule"]} ^ {*_by_rule(optimizer)})
    if others:
        some = ", ".join(others[:SHOWN]) + ", ..." * (len(others) > SHOWN)
        raise UserError(
            f"the checkpoint's optimizer updated {some} by another rule than the configuration has for them: resume "
            "with the target_modules, head and embeddings of optimizer.params that it was written with"
        )
    check_counts(numbers, own=_of_own_rules(optimizer))
    check_moments(optimizer.prepare().layout, saved)
    if optimizer.matrices is not None:
        converts = numbers["rule"] != rule_form(optimizer.config)
        check_matrices(optimizer.matrices, numbers["matrices"], saved, converts=converts)
    return ""


def notes(optimizer: MegalrOptimizer, numbers: Mapping[str, Any]) -> list[str]:
    """Sentences for the log on what goes on in another way than it did; for what :func:`check` has let pass."""
    begins_anew = numbers["logical_rule"] != logical_form(optimizer.config)
    return [] if begins_anew else changed_settings(numbers.get("settings"), optimizer.config)


def make_room(optimizer: MegalrOptimizer, numbers: Mapping[str, Any], saved: Mapping[str, Tensor]) -> None:
    """Take over numbers, and have tensors for what was saved, whose values are to be read into :func:`entries_of`.

    Then :func:`settle` makes of them what the optimizer goes on with.

    Args:
        optimizer: that :func:`check` was given.
        numbers: of :func:`numbers_of`, with the matrices of all ranks.
        saved: tensors on the meta device, by the keys of :func:`entries_of`, of all ranks.
    """
    begins_anew = numbers["logical_rule"] != logical_form(optimizer.config)
    optimizer.updates = numbers["updates"]
    optimizer.forget_update()
    optimizer.clocks = {name: Clock() if begins_anew else Clock(**clock) for name, clock in numbers["clocks"].items()}
    shard = optimizer.prepare()
    for buffer, parameter in enumerate(shard.parameters):
        names = {f.name for f in shard.layout.fragments if f.buffer == buffer}
        optimizer.state.pop(parameter, None)
        if not begins_anew and any(f"{MOMENTS[0]}/{name}" in saved for name in names):
            optimizer.ensure_moments([parameter])
    if optimizer.matrices is not None:
        converts = numbers["rule"] != rule_form(optimizer.config)
        optimizer.matrices.make_room({} if begins_anew else numbers["matrices"], saved if converts else {})
    load_event_numbers(optimizer, numbers["events"])
    for event in optimizer.events:
        event.make_room(saved)


def set_rates(optimizer: MegalrOptimizer, numbers: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Take over the learning rates of groups that there are still; those that were others before, and what they are."""
    changed = {}
    for group in optimizer.all_groups:
        before, rate = group["lr"], numbers["lr"].get(group["name"], group["lr"])
        group["lr"] = rate
        if rate != before:
            changed[group["name"]] = before, rate
    return changed


def settle(optimizer: MegalrOptimizer, numbers: Mapping[str, Any]) -> None:
    """Convert loaded tensors to the optimizer's own format; ``numbers`` as they were given to :func:`make_room`."""
    if optimizer.matrices is not None and numbers["rule"] != rule_form(optimizer.config):
        optimizer.matrices.convert()
    for event in optimizer.events:
        event.settle()


def _of_layers(optimizer: MegalrOptimizer) -> list[LayerEvents]:
    """The events that keep something of the model's layers."""
    return [event for event in optimizer.events if isinstance(event, LayerEvents)]


def _by_rule(optimizer: MegalrOptimizer) -> list[str]:
    """Names of the parameters that the rule updates, also of those that have no state now."""
    return [] if optimizer.matrices is None else sorted(optimizer.matrices.parameters)


def _of_own_rules(optimizer: MegalrOptimizer) -> set[str]:
    """The matrices that a user's rule updates."""
    matrices = optimizer.matrices.matrices if optimizer.matrices is not None else []
    return {matrix.name for matrix in matrices if not is_of_megalr(matrix.rule)}


def _refuse_parts(optimizer: MegalrOptimizer) -> None:
    """Refuse what is not of one logical matrix."""
    optimizer.prepare()
    if optimizer.updates_parts:
        raise UserError(
            'with "tp_update": "local" each tensor-parallel rank has states of its own, which fit no other layout: use '
            "engine.save_checkpoint and engine.load_checkpoint"
        )
