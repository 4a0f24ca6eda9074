"""The optimizer's part in an engine's own checkpoints, which fit one layout: numbers and entries, as in state.py.

An engine's checkpoint keeps AdamW's moments itself, as torch's optimizers do. Beside them go counts, and what this rank
keeps of rules and events.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megalr.agreement import is_first
from megalr.errors import UserError
from megalr.layout.rectangles import Entry
from megalr.optim.clock import Clock
from megalr.optim.events.base import Event
from megalr.optim.forms import changed_settings, in_words, layer_form, rule_form, rule_settings
from megalr.optim.loading import check_keys
from megalr.optim.state import event_numbers, kept_entries, load_event_numbers

if TYPE_CHECKING:
    from megalr.optim.matrices import MatrixUpdater
    from megalr.optim.optimizer import MegalrOptimizer

logger = logging.getLogger(__name__)

KINDS = ("rule", "remainders", "waiting", "directions")  # of this package's entries beside moments
COMMON = ("updates", "clocks", "form", "matrices")  # everything else that version 0.1 wrote is of an event


@dataclass(frozen=True)
class Loaded:
    """What was loaded, until it is known what lies where.

    Attributes:
        matrices: the numbers in the rule's states, by matrix.
        tensors: this rank's, by the keys of entries: one for each of an entry's pieces, or all in one flat tensor.
    """

    matrices: Mapping[str, Mapping[str, float]]
    tensors: Mapping[str, Sequence[Tensor]]


def save(optimizer: MegalrOptimizer, waiting: Loaded | None, *, is_prepared: bool) -> dict[str, Any]:
    """Plain numbers and tensors, which are not copies.

    Args:
        optimizer: at any time.
        waiting: what was loaded and not yet filled in.
        is_prepared: whether it is known what lies where; it is not asked for here, since an engine may come later.
    """
    if waiting is None:
        matrices = optimizer.matrices.numbers() if is_prepared and optimizer.matrices is not None else {}
        entries = kept_entries(optimizer) if is_prepared else {}
        tensors = {key: [piece.data for piece in entry.pieces] for key, entry in entries.items()}
        waiting = Loaded(matrices, tensors)
    return {
        **optimizer.counts(),
        "form": rule_form(optimizer.config) | layer_form(optimizer.config),
        "settings": rule_settings(optimizer.config),
        "events": event_numbers(optimizer),
        **vars(waiting),
    }


def load(optimizer: MegalrOptimizer, state_dict: Mapping[str, Any]) -> Loaded:
    """Take over the numbers of what :func:`save` gave, and return the rest for :func:`fill`.

    Args:
        optimizer: with the same parameters.
        state_dict: of the optimizer, with the key "megalr".

    Raises:
        UserError: it was written with settings that give a state of another form.
        ValueError: it is no state of this class.
    """
    if "megalr" not in state_dict:
        raise ValueError("this optimizer state was not written by megalr: it has no update counts")
    saved = state_dict["megalr"]
    before, form = saved.get("form", {}), rule_form(optimizer.config) | layer_form(optimizer.config)
    if before != form:  # the same on all ranks, so that none goes on alone
        raise UserError(
            f"the checkpoint was written with {in_words(before)}, the configuration has {in_words(form)}: "
            "resume with the optimizer settings that it was written with"
        )
    if is_first():
        for note in changed_settings(saved.get("settings"), optimizer.config):
            logger.warning(note)
    if "tensors" not in saved:
        saved = _from_version_0_1(saved)
    optimizer.updates = saved["updates"]
    optimizer.clocks = {name: Clock(**values) for name, values in saved["clocks"].items()}
    load_event_numbers(optimizer, saved["events"])
    _fill_events(optimizer.events, saved["tensors"], needs_layout=False)
    return Loaded(saved["matrices"], saved["tensors"])


def fill(optimizer: MegalrOptimizer, loaded: Loaded) -> None:
    """Take over tensors that were loaded, once it is known what lies where.

    Raises:
        UserError: they belong to another rule, rank or layout, or the rule has no place for all of them.
    """
    if optimizer.matrices is not None:
        optimizer.matrices.make_room(loaded.matrices, {})
        _check_keys(optimizer.matrices, loaded)
    rules = {} if optimizer.matrices is None else optimizer.matrices.entries()
    early = [event for event in optimizer.events if not event.needs_layout]  # filled by load, and used since
    known = rules.keys() | {key for event in early for key in event.entries()}
    known |= _fill_events(optimizer.events, loaded.tensors, needs_layout=True)
    unknown = (loaded.matrices.keys() - optimizer.matrix_states.keys()) | (loaded.tensors.keys() - known)
    if unknown:
        kind, slash, _ = min(unknown).partition("/")
        if slash and kind not in KINDS:
            raise UserError(
                f"the checkpoint holds {min(unknown)}, for which the layers' events prepare nothing: make_room() has "
                "to allocate every tensor that entries() returns"
            )
        raise UserError(
            f"the checkpoint holds the state of {min(unknown)}, which this rank does not own: resume with the ZeRO "
            "stage, number of processes and optimizer settings that it was written with"
        )
    _fill_entries(rules, loaded.tensors)


def _check_keys(updater: MatrixUpdater, loaded: Loaded) -> None:
    """Make sure that nothing is lost of the states that this rank keeps."""
    saved: dict[str, set[str]] = {}
    for entry in loaded.tensors:
        kind, _, place = entry.partition("/")
        if kind == "rule":
            name, _, key = place.rpartition("/")
            saved.setdefault(name, set()).add(key)
    for matrix in updater.matrices:
        if matrix.name in updater.states:
            check_keys(matrix, loaded.matrices[matrix.name], saved.get(matrix.name, ()), updater.states[matrix.name])


def _fill_events(events: Sequence[Event], tensors: Mapping[str, Sequence[Tensor]], *, needs_layout: bool) -> set[str]:
    """Read into the events of one kind what is theirs; the keys of that."""
    keys: set[str] = set()
    for event in (event for event in events if event.needs_layout is needs_layout):
        event.make_room(tensors)
        entries = event.entries()
        _fill_entries(entries, tensors)
        keys |= entries.keys()
        event.settle()
    return keys


def _fill_entries(entries: Mapping[str, Entry], tensors: Mapping[str, Sequence[Tensor]]) -> None:
    """Put values where the pieces of entries lie, in their order."""
    for key, entry in entries.items():
        values, pieces = tensors.get(key, ()), [piece.data for piece in entry.pieces]
        found, numel = (sum(each.numel() for each in part) for part in (values, pieces))
        if found != numel:
            raise UserError(
                f"the checkpoint's state {key} has {found} elements on this rank, but with these settings it has "
                f"{numel}: resume with the ZeRO stage, number of processes and optimizer settings that it was written "
                "with"
            )
        flat, position = torch.cat([value.reshape(-1) for value in values]), 0
        for piece in pieces:
            piece.copy_(flat[position : position + piece.numel()].view(piece.shape))
            position += piece.numel()


def _from_version_0_1(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The same in today's form. Version 0.1 kept each state as a dictionary of tensors and numbers, by its owner."""
    tensors: dict[str, list[Tensor]] = {}
    matrices: dict[str, dict[str, float]] = {}
    for name, state in saved.get("matrices", {}).items():
        matrices[name] = {key: value for key, value in state.items() if not isinstance(value, Tensor)}
        tensors |= {f"rule/{name}/{key}": [value] for key, value in state.items() if isinstance(value, Tensor)}
    events: dict[str, Any] = {}
    for key in saved.keys() - set(COMMON):
        state = dict(saved[key])
        if key == "activations":
            state = {"directions": state}
        for kind in ("remainders", "waiting", "directions"):
            tensors |= {f"{kind}/{name}": [value] for name, value in state.pop(kind, {}).items()}
        events[key] = state
    return {**saved, "matrices": matrices, "events": events, "tensors": tensors}
