"""What a checkpoint has of an engine: the optimizer's state, frozen weights, buffers, counts, random states."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalr.checkpoint.random_states import random_states, set_random_states
from megalr.checkpoint.schedules import check_schedule, goes_on, schedule_numbers, set_schedule
from megalr.errors import UserError, some_of
from megalr.generation import next_generation
from megalr.hosts import held, host_of, logical_shape
from megalr.hosts.tensor_parallel import indices_in_whole, part_offset
from megalr.layers.base import FactorizedLinear
from megalr.layout.exchange import write
from megalr.layout.placement import Unit
from megalr.layout.rectangles import Entry, Piece, folded, rectangles
from megalr.naming import named_buffers, named_modules, named_parameters, submodule
from megalr.optim.forms import logical_form
from megalr.optim.groups import check_names
from megalr.optim.optimizer import MegalrOptimizer
from megalr.optim.state import MOMENTS, check, entries_of, make_room, notes, numbers_of, set_rates, settle


class Contents:
    """An engine's state as numbers and entries; every method is collective.

    To load: :meth:`check`, :meth:`make_room`, read into :meth:`targets`, :meth:`settle`.

    Attributes:
        notes: what a reader of the log should know of a load.
    """

    def __init__(self, engine: Any) -> None:
        """
        Args:
            engine: DeepSpeed's, with a :class:`~megalr.optim.MegalrOptimizer`.

        Raises:
            UserError: it is a pipeline's, or has another optimizer, or one that was built for another module.
        """
        host = host_of(engine)
        if not isinstance(host.optimizer, MegalrOptimizer):
            raise UserError(
                f"the engine's optimizer is {type(host.optimizer).__name__}, of which megalr's checkpoints "
                "know nothing: make the engine with megalr.initialize or give deepspeed.initialize what "
                "megalr.build_optimizer returns, or use engine.save_checkpoint and engine.load_checkpoint"
            )
        if host.has_stages:
            raise UserError(
                "megalr's checkpoints do not hold pipeline engines, of which each stage has a model of its own: use "
                "engine.save_checkpoint and engine.load_checkpoint"
            )
        self._host = host
        self._guard = getattr(engine, "megalr_guard", None)
        self._optimizer = host.optimizer
        self._module: nn.Module = host.module
        check_names(self._optimizer.groups, self._module)
        self._shard = self._optimizer.prepare()
        for name, module in named_modules(self._module):
            if type(module).get_extra_state is not nn.Module.get_extra_state:
                warnings.warn(f"megalr's checkpoints do not hold what get_extra_state of {name} gives", stacklevel=3)
        # Values that tensor-parallel ranks have chosen from a sparse vector, and the places that they have in it.
        found = {name: indices_in_whole(p) for name, p in named_parameters(self._module)}
        self._chosen = {name: places for name, places in found.items() if places is not None}
        self._targets: dict[str, Entry] = {}
        self.notes: list[str] = []

    def numbers(self) -> dict[str, Any]:
        """Counts and settings, as JSON has them; the same on every rank but for "matrices".

        Raises:
            UserError: the masters are not what the model has, see :func:`megalr.adopt_weights`; on all ranks alike.
        """
        self._optimizer.check_model()
        host, numbers = self._host, numbers_of(self._optimizer)
        shared = {id(p): n for n, p in reversed(list(named_parameters(self._module)))}
        return {
            "matrices": numbers.pop("matrices"),
            "optimizer": numbers,
            "engine": host.counters(),
            "schedule": schedule_numbers(host.schedule),
            "loss_scaler": host.loss_scale(),
            "guard": None if self._guard is None else self._guard.state_dict(),
            "names": {
                name: shared[id(p)]
                for name, p in named_parameters(self._module, remove_duplicate=False)
                if shared[id(p)] != name
            },
            "shapes": {name: list(shape) for name, shape in self._shapes() if folded(shape) != tuple(shape)},
            "chosen_by": host.groups().tensor_size if self._states_of_chosen() else 0,
        }

    def entries(self) -> dict[str, Entry]:
        """What this rank could write; buffers are the first one's, also where each has made its own statistics."""
        return (
            self._portable(once=True)
            | self._frozen()
            | (dict(self._buffers()) if dist.get_rank() == 0 else {})
            | {"random/{}.{}".format(*self._ranks()): Entry.of(random_states())}
        )

    def check(self, numbers: Mapping[str, Any], saved: Mapping[str, Tensor], read: Callable[[str], Tensor]) -> str:
        """Make sure that the engine can go on from a checkpoint; nothing is changed.

        Args:
            numbers: of :meth:`numbers`, with the matrices of all ranks.
            saved: tensors on the meta device, by key.
            read: gives a saved tensor by its key.

        Returns:
            What of the checkpoint the engine has no use for, in words; empty if it takes over all.

        Raises:
            UserError: the checkpoint is of another model or of settings that cannot be continued; an update has begun.
        """
        self._check_boundary()
        self._optimizer.check_model(weights=False)
        self._check_model(saved)
        shares = self._host.groups().tensor_size
        if numbers["chosen_by"] not in (0, shares):
            raise UserError(
                f"the rule's state of sparse values was written by {numbers['chosen_by']} tensor-parallel ranks, and "
                f"only so many can go on with it; there are {shares}"
            )
        self._check_places(read)
        dropped = [check(self._optimizer, {**numbers["optimizer"], "matrices": numbers["matrices"]}, saved)]
        self.notes += notes(self._optimizer, numbers["optimizer"])
        if numbers["schedule"] is not None and not self._schedule_goes_on(numbers):
            dropped.append(f"the state of the learning-rate schedule {numbers['schedule']['type']}")
        elif numbers["schedule"] is not None:
            check_schedule(self._host.schedule, numbers["schedule"])
        return " and ".join(filter(None, dropped))

    def make_room(self, numbers: Mapping[str, Any], saved: Mapping[str, Tensor]) -> None:
        """Take over numbers, and have tensors for what was saved.

        Args:
            numbers, saved: that :meth:`check` was given.
        """
        make_room(self._optimizer, {**numbers["optimizer"], "matrices": numbers["matrices"]}, saved)
        self._host.prepare_load()
        found = self._portable(once=False) | self._frozen()
        self._buffers_read = {key: Entry.of(entry.pieces[0].data.clone()) for key, entry in self._buffers()}
        found |= self._buffers_read
        data, tensor = self._ranks()
        own = f"random/{data}.{tensor}"
        # Ranks that share layers have to draw alike, unless those of the checkpoint did not.
        self._random_key = own if own in saved else f"random/{data}.0"
        if self._random_key in saved:
            found[self._random_key] = Entry.of(torch.empty_like(saved[self._random_key], device="cpu"))
        self._targets = found

    def targets(self) -> dict[str, Entry]:
        """What this rank wants to read."""
        return self._targets

    def settle(self, numbers: Mapping[str, Any]) -> None:
        """Make what was read that which the engine trains on."""
        for name, places in self._chosen.items():
            for kind, field in self._fields().items():
                if f"{kind}/{name}" in self._targets:
                    (piece,) = self._targets[f"{kind}/{name}"].pieces
                    own = self._shard.layout.on(name, self._shard.rank)
                    write(piece.data[places.to(piece.data.device)], field, own)
        self._settle_buffers()
        settle(self._optimizer, numbers["optimizer"])
        self._host.publish(self._shard)
        next_generation()
        self._host.set_counters(numbers["engine"])
        self._settle_schedule(numbers)
        self._host.set_loss_scale(numbers["loss_scaler"])
        if self._guard is not None and numbers["guard"] is not None:
            self._guard.load_state_dict(numbers["guard"])
        if self._random_key in self._targets:
            set_random_states(self._targets[self._random_key].pieces[0].data)

    def _schedule_goes_on(self, numbers: Mapping[str, Any]) -> bool:
        return goes_on(self._host.schedule, numbers["schedule"], same_groups=self._has_groups_of(numbers))

    def _has_groups_of(self, numbers: Mapping[str, Any]) -> bool:
        """Whether learning rates of groups can be taken over: those of another rule mean something else."""
        names = [group["name"] for group in self._optimizer.all_groups]
        same_rule = numbers["optimizer"]["logical_rule"] == logical_form(self._optimizer.config)
        return same_rule and list(numbers["optimizer"]["lr"]) == names

    def _settle_schedule(self, numbers: Mapping[str, Any]) -> None:
        """A schedule and the rates that it has made of the groups; those of other groups stay."""
        schedule, saved = self._host.schedule, numbers["schedule"]
        if not self._schedule_goes_on(numbers):
            if schedule is not None:
                name = type(schedule).__name__
                self.notes.append(f"the learning-rate schedule {name} is not the checkpoint's: it stays where it is")
            return
        same_groups = self._has_groups_of(numbers)
        changed = set_rates(self._optimizer, numbers["optimizer"]) if same_groups else {}
        if schedule is not None:
            set_schedule(schedule, saved, same_groups=same_groups)
        elif changed:
            rates = ", ".join(f"{name} {before:g} -> {rate:g}" for name, (before, rate) in changed.items())
            self.notes.append(f"without a schedule, learning rates are the checkpoint's: {rates}")

    def _check_boundary(self) -> None:
        """Refuse a load while gradients are there, which ZeRO would add those of the next micro-batch to."""
        made, size = self._host.progress()
        if made or self._host.awaits_step:
            last = ", and a backward pass waits for its step" if self._host.awaits_step else ""
            raise UserError(
                f"an update has begun: {made} of its {size} micro-batches are made{last}. Load between two updates"
            )

    def _check_model(self, saved: Mapping[str, Tensor]) -> None:
        trained = {f"weights/{name}": folded(shape) for name, shape in self._shard.layout.shapes.items()}
        frozen = {f"frozen/{n}": folded(_whole(n, p)) for n, p in self._frozen_parameters()}
        buffers = {key: entry.shape for key, entry in self._buffers()}
        mine = {key: shape for key, shape in (trained | frozen | buffers).items() if math.prod(shape)}
        kinds = ("weights", "frozen", "buffers")
        theirs = {key: tuple(each.shape) for key, each in saved.items() if key.split("/")[0] in kinds}
        wrong = [key for key in {**mine, **theirs} if mine.get(key) != theirs.get(key)]
        if wrong:
            lines = [f"{key}: {theirs.get(key, 'none')} -> {mine.get(key, 'none')}" for key in wrong]
            raise UserError(
                "the checkpoint is of another model or parametrization (checkpoint -> now):\n  "
                + some_of(lines, 5, "\n  ")
                + "\nload it with the model and the megalr.parametrization that it was written with"
            )

    def _check_places(self, read: Callable[[str], Tensor]) -> None:
        """Tensor-parallel ranks have chosen their values by the buffers that they started with."""
        layers = {name.rpartition(".")[0] for name in self._chosen}
        for key, entry in self._buffers():
            name = key.partition("/")[2]
            if name.rpartition(".")[0] in layers and not torch.equal(read(key), entry.pieces[0].data.cpu()):
                raise UserError(
                    f"{name} is another one in the checkpoint: tensor-parallel ranks load sparse layers only if they "
                    "were started with the megalr.seed of the run that saved"
                )

    def _shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Of whole parameters and buffers."""
        yield from self._shard.layout.shapes.items()
        for name, parameter in self._frozen_parameters():
            yield name, _whole(name, parameter)
        yield from ((name, tuple(buffer.shape)) for name, buffer in self._persistent_buffers())

    def _portable(self, *, once: bool) -> dict[str, Entry]:
        """The optimizer's, with sparse vectors in the order that one process has."""
        found = entries_of(self._optimizer, once=once)
        for name, places in self._chosen.items():
            for kind, field in self._fields().items():
                found.pop(f"{kind}/{name}", None)
                if not any(flat.numel() for flat in field):
                    continue  # no moments yet
                whole = torch.empty(self._shard.layout.numel(name), device=field[0].device)
                if once:
                    gathered = self._optimizer.exchange.gather([Unit((name,), owner=0)], [field])
                    if name not in gathered:
                        continue
                    whole.index_copy_(0, places.to(whole.device), gathered[name][0])
                found[f"{kind}/{name}"] = Entry.of(whole)
        return found

    def _fields(self) -> dict[str, Any]:
        return {"weights": self._shard.buffers, **{key: self._optimizer.moments(key) for key in MOMENTS}}

    def _states_of_chosen(self) -> bool:
        matrices = self._optimizer.matrices
        return matrices is not None and any(m.name in self._chosen for m in matrices.matrices)

    def _ranks(self) -> tuple[int, int]:
        """This one among those that read other data, and among those that share layers with it."""
        groups = self._host.groups()
        return groups.data_rank, groups.tensor_rank

    def _frozen_parameters(self) -> Iterator[tuple[str, Any]]:
        return ((n, p) for n, p in named_parameters(self._module) if not p.requires_grad)

    def _frozen(self) -> dict[str, Entry]:
        found = {}
        for name, parameter in self._frozen_parameters():
            origin, whole = part_offset(name, parameter)
            start, flat = held(parameter)[0]
            pieces: list[Piece] = rectangles(logical_shape(parameter), start, flat, origin)
            if pieces:
                found[f"frozen/{name}"] = Entry(folded(whole), flat.dtype, tuple(pieces))
        return found

    def _buffers(self) -> Iterator[tuple[str, Entry]]:
        return ((f"buffers/{name}", Entry.of(buffer.contiguous())) for name, buffer in self._persistent_buffers())

    def _persistent_buffers(self) -> Iterator[tuple[str, Tensor]]:
        for module_name, module in named_modules(self._module):
            for name, buffer in module.named_buffers(module_name, recurse=False):
                if name.rpartition(".")[2] not in module._non_persistent_buffers_set and buffer.numel():
                    yield name, buffer

    def _settle_buffers(self) -> None:
        changed = set()
        for name, buffer in named_buffers(self._module):
            entry = self._buffers_read.get(f"buffers/{name}")
            if entry is not None and not torch.equal(buffer.view(entry.shape), entry.pieces[0].data):
                buffer.copy_(entry.pieces[0].data.view(buffer.shape))
                changed.add(name.rpartition(".")[0])
        for name in changed:
            layer = submodule(self._module, name)
            if isinstance(layer, FactorizedLinear):
                layer.buffers_changed()


def _whole(name: str, parameter: Tensor) -> tuple[int, ...]:
    return part_offset(name, parameter)[1]
