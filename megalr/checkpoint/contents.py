"""What a checkpoint has of an engine: the optimizer's state, frozen weights, buffers, counts, random states."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalr.errors import UserError
from megalr.optim.groups import logical_shape
from megalr.optim.portable import MOMENTS, entries_of, make_room, numbers_of
from megalr.partition import frozen_parts, place_of_part, places_in_whole
from megalr.partition.exchange import Item, write
from megalr.partition.pieces import Entry, Piece, folded, rectangles

COUNTS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")
SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class Contents:
    """An engine's state as numbers and entries; every method is collective.

    To load: :meth:`make_room`, read into :meth:`targets`, :meth:`settle`.
    """

    def __init__(self, engine: Any) -> None:
        """
        Args:
            engine: DeepSpeed's, with a :class:`~megalr.optim.MegalrOptimizer`.
        """
        self._engine = engine
        self._optimizer = engine.basic_optimizer
        self._module: nn.Module = engine.module
        self._shard = self._optimizer.prepare()
        # Values that tensor-parallel ranks have chosen from a sparse vector, and the places that they have in it.
        found = {name: places_in_whole(p) for name, p in self._module.named_parameters()}
        self._chosen = {name: places for name, places in found.items() if places is not None}
        self._targets: dict[str, Entry] = {}

    def numbers(self) -> dict[str, Any]:
        """Counts and settings, as JSON has them; the same on every rank but for "matrices"."""
        engine, numbers = self._engine, numbers_of(self._optimizer)
        shared = {id(p): n for n, p in reversed(list(self._module.named_parameters()))}
        scheduler, scaler = engine.lr_scheduler, _loss_scaler(engine)
        guard = getattr(engine, "megalr_guard", None)
        return {
            "matrices": numbers.pop("matrices"),
            "optimizer": numbers,
            "engine": {key: getattr(engine, key) for key in COUNTS},
            "scheduler": None if scheduler is None else _plain("the learning-rate schedule", scheduler.state_dict()),
            "loss_scaler": {
                key: getattr(scaler, key) for key in SCALER if engine.fp16_enabled() and hasattr(scaler, key)
            },
            "guard": None if guard is None else guard.state_dict(),
            "names": {
                name: shared[id(p)]
                for name, p in self._module.named_parameters(remove_duplicate=False)
                if shared[id(p)] != name
            },
            "shapes": {name: list(shape) for name, shape in self._shapes() if folded(shape) != tuple(shape)},
            "chosen_by": self._shares() if self._states_of_chosen() else 0,
        }

    def entries(self) -> dict[str, Entry]:
        """What this rank could write."""
        return self._portable(once=True) | self._frozen() | dict(self._buffers()) | _random_state()

    def make_room(self, numbers: Mapping[str, Any], saved: Mapping[str, tuple[int, ...]]) -> str:
        """Take over numbers, and have tensors for what was saved.

        Args:
            numbers: of :meth:`numbers`, with the matrices of all ranks.
            saved: shapes by key.

        Returns:
            See :func:`megalr.optim.portable.make_room`.

        Raises:
            UserError: the checkpoint is of another model or of settings that cannot be continued. Nothing has changed.
        """
        self._check_model(saved)
        if numbers["chosen_by"] not in (0, self._shares()):
            raise UserError(
                f"the rule's state of sparse values was written by {numbers['chosen_by']} tensor-parallel ranks, and "
                f"only so many can go on with it; there are {self._shares()}"
            )
        dropped = make_room(self._optimizer, {**numbers["optimizer"], "matrices": numbers["matrices"]}, saved)
        self._prologue()
        found = self._portable(once=False) | self._frozen()
        self._buffers_read = {key: Entry.of(entry.pieces[0].data.clone()) for key, entry in self._buffers()}
        found |= self._buffers_read
        self._random_key = f"random/{_rank()}"
        if self._random_key in saved:
            found[self._random_key] = Entry.of(torch.empty(saved[self._random_key], dtype=torch.uint8))
        self._targets = found
        return dropped

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
        self._epilogue()
        engine = self._engine
        for key, value in numbers["engine"].items():
            setattr(engine, key, value)
        if engine.lr_scheduler is not None and numbers["scheduler"] is not None:
            engine.lr_scheduler.load_state_dict(numbers["scheduler"])
        scaler = _loss_scaler(engine)
        for key, value in numbers["loss_scaler"].items():
            setattr(scaler, key, value)
        guard = getattr(engine, "megalr_guard", None)
        if guard is not None and numbers["guard"] is not None:
            guard.load_state_dict(numbers["guard"])
        if self._random_key in self._targets:
            _set_random_state(self._targets[self._random_key].pieces[0].data)

    def _check_model(self, saved: Mapping[str, tuple[int, ...]]) -> None:
        trained = {f"weights/{name}": folded(shape) for name, shape in self._shard.layout.shapes.items()}
        frozen = {f"frozen/{n}": folded(_whole(n, p)) for n, p in self._frozen_parameters()}
        buffers = {key: entry.shape for key, entry in self._buffers()}
        mine = trained | frozen | buffers
        theirs = {key: shape for key, shape in saved.items() if key.split("/")[0] in ("weights", "frozen", "buffers")}
        wrong = [key for key in {**mine, **theirs} if mine.get(key) != theirs.get(key)]
        if wrong:
            lines = [f"  {key}: {theirs.get(key, 'none')} -> {mine.get(key, 'none')}" for key in wrong[:5]]
            more = f"\n  and {len(wrong) - 5} more" if len(wrong) > 5 else ""  # noqa: PLR2004  (lines that are shown)
            raise UserError(
                "the checkpoint is of another model or parametrization (checkpoint -> now):\n"
                + "\n".join(lines)
                + more
                + "\nload it with the model and the megalr.parametrization that it was written with"
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
                had = found.pop(f"{kind}/{name}", None)
                if not any(flat.numel() for flat in field):
                    continue
                if not once:
                    size = self._shard.layout.numel(name)
                    found[f"{kind}/{name}"] = Entry.of(torch.empty(size, device=field[0].device))
                    continue
                del had
                gathered = self._optimizer.exchange.gather([Item(name, 0)], [field])
                for whole in gathered.get(name, []):
                    found[f"{kind}/{name}"] = Entry.of(
                        torch.empty_like(whole).index_copy_(0, places.to(whole.device), whole)
                    )
        return found

    def _fields(self) -> dict[str, Any]:
        return {"weights": self._shard.buffers, **{key: self._optimizer.moments(key) for key in MOMENTS}}

    def _states_of_chosen(self) -> bool:
        matrices = self._optimizer.matrices
        return matrices is not None and any(m.name in self._chosen for m in matrices.matrices)

    def _shares(self) -> int:
        from deepspeed.utils import groups  # noqa: PLC0415
        from deepspeed.utils.bwc import bwc_tensor_model_parallel_world_size  # noqa: PLC0415

        size: int = bwc_tensor_model_parallel_world_size(groups.mpu)
        return size

    def _frozen_parameters(self) -> Iterator[tuple[str, Any]]:
        return ((n, p) for n, p in self._module.named_parameters() if not p.requires_grad)

    def _frozen(self) -> dict[str, Entry]:
        found = {}
        for name, parameter in self._frozen_parameters():
            origin, whole = place_of_part(name, parameter)
            start, flat = frozen_parts(parameter)[0]
            pieces: list[Piece] = rectangles(logical_shape(parameter), start, flat, origin)
            if pieces:
                found[f"frozen/{name}"] = Entry(folded(whole), flat.dtype, tuple(pieces))
        return found

    def _buffers(self) -> Iterator[tuple[str, Entry]]:
        return ((f"buffers/{name}", Entry.of(buffer.contiguous())) for name, buffer in self._persistent_buffers())

    def _persistent_buffers(self) -> Iterator[tuple[str, Tensor]]:
        for module_name, module in self._module.named_modules():
            for name, buffer in module.named_buffers(module_name, recurse=False):
                if name.rpartition(".")[2] not in module._non_persistent_buffers_set and buffer.numel():
                    yield name, buffer

    def _settle_buffers(self) -> None:
        changed = set()
        for name, buffer in self._module.named_buffers():
            entry = self._buffers_read.get(f"buffers/{name}")
            if entry is not None and not torch.equal(buffer.view(entry.shape), entry.pieces[0].data):
                buffer.copy_(entry.pieces[0].data.view(buffer.shape))
                changed.add(name.rpartition(".")[0])
        for layer in changed:
            renew = getattr(self._module.get_submodule(layer), "draw_support", None)
            if renew is not None:
                if self._chosen:
                    raise UserError(
                        f"{layer} has other sparse places than the checkpoint: tensor-parallel ranks load only "
                        "what was started with the same megalr.seed"
                    )
                renew()

    def _prologue(self) -> None:
        """At stage 3 parameters must lie cut, as they do in an update."""
        prologue = getattr(self._engine.optimizer, "checkpoint_event_prologue", None)
        if prologue is not None:
            prologue()

    def _epilogue(self) -> None:
        """From the masters to the weights that the model computes with, on all ranks."""
        zero = self._engine.optimizer
        if hasattr(zero, "update_lp_params"):
            zero.update_lp_params()
        else:
            for buffer in range(len(self._shard.buffers)):
                self._shard.publish(buffer)
        epilogue = getattr(zero, "checkpoint_event_epilogue", None)
        if epilogue is not None:
            epilogue()


def _whole(name: str, parameter: Tensor) -> tuple[int, ...]:
    return place_of_part(name, parameter)[1]


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _loss_scaler(engine: Any) -> Any:
    """What holds fp16's loss scale: the wrapper itself or its scaler."""
    wrapper = engine.optimizer
    return getattr(wrapper, "loss_scaler", wrapper)


def _plain(what: str, value: Any) -> Any:
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise UserError(f"{what} has a state that JSON cannot hold: {error}") from error


def _random_state() -> dict[str, Entry]:
    """This rank's, as the bytes of JSON."""
    version, numbers, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state()
    state = {
        "python": [version, list(numbers), gauss],
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "cuda": torch.cuda.get_rng_state().numpy().tobytes().hex() if torch.cuda.is_available() else None,
    }
    data = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
    return {f"random/{_rank()}": Entry.of(data)}


def _set_random_state(data: Tensor) -> None:
    state = json.loads(bytes(data.tolist()))
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(_bytes(state["torch"]))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes(state["cuda"]))


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
