"""What a user may not do to a model once an engine trains it, noticed before the next update and before a checkpoint.

An engine trains the parameters that it was made with, in buffers of its own, and overwrites the model's weights with
what it has there. What is done to the model afterwards would be undone, or left out of checkpoints, without a word.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from megalr.errors import UserError, some_of
from megalr.hosts import is_partitioned, logical_shape
from megalr.layers.base import KeepsWeight
from megalr.layers.replacement import bypassed_layers
from megalr.layout.exchange import Exchange
from megalr.layout.shard import Shard, Twin
from megalr.naming import named_parameters

SHOWN = 3  # names in a message
CHUNK = 1 << 22  # elements that are cast at a time
ANEW = "initialize again with the model as it is to be trained"
FROZEN = (
    "frozen after the engine was made: {names}. Moments and weight decay would go on moving it. Freeze before "
    "initialize; to freeze in the middle of a run, initialize a new model with it frozen and hand the weights over "
    "with megalr.adopt_weights"
)
UNHELD = (
    "trained by nobody, and missing from checkpoints: {names}. It was unfrozen, added, untied or put in another's "
    "place after the engine was made, and the optimizer does not hold it. To write values use p.data.copy_(...) and "
    f"megalr.adopt_weights(engine); otherwise {ANEW}"
)
GONE = (
    "trained, but no longer in the model: {names}. It was removed, replaced or tied after the engine was made. Put it "
    f"back, or {ANEW}"
)
MOVED = (
    "in other memory or of another dtype than when the engine was made, as after model.to(...) or p.data = ...: "
    "{names}. The engine updates what the model no longer uses. To write values use p.data.copy_(...) and "
    f"megalr.adopt_weights(engine); otherwise {ANEW}"
)
WRITTEN = (
    "written since the last update: {names}. The engine would overwrite it with its fp32 master. If the weights were "
    "written, by a load, an initialization or an average, call megalr.adopt_weights(engine) before the next backward "
    "pass. If the masters were, as by deepspeed.utils.safe_set_full_fp32_param, call megalr.adopt_weights(engine, "
    "masters=True)"
)
BYPASSED = (
    "never called, while the model has read `weight` of it in training: {names}. The model computes with the frozen W0 "
    "past the layer, and what is learned beside it has no effect: leave it out of "
    "megalr.parametrization.target_modules. If the weight is only looked at, as for a log, read it under "
    "torch.no_grad()"
)


class ModelCheck:
    """Compares a model with what the optimizer holds of it; all ranks come to the same result."""

    def __init__(
        self, model: nn.Module | None, given: Mapping[str, nn.Parameter], shard: Shard, exchange: Exchange
    ) -> None:
        """
        Args:
            model: what is trained; None where only the parameters are known.
            given: the optimizer's parameters by qualified name.
            shard, exchange: of their masters.
        """
        self._model, self._shard, self._exchange = model, shard, exchange
        self._trained = {name: given[name] for name in shard.layout.shapes}
        self._ids = {id(parameter) for parameter in self._trained.values()}
        self._keeping = [] if model is None else [m for m in model.modules() if isinstance(m, KeepsWeight)]
        self._places = [_place(parameter) for parameter in self._trained.values()]

    def run(self, *, weights: bool = True, are_loaded: bool = False, after_pass: bool = False) -> None:
        """Raise if an update would undo, or a checkpoint leave out, what was done to the model. Collective.

        Args:
            weights: whether to compare the weights with the masters as well.
            are_loaded: an engine has loaded both since the last update, the weights perhaps of another dtype.
            after_pass: whether a forward pass in training was made, which shows what the model computes with.

        Raises:
            UserError: naming the parameters and what to write; on all ranks alike.
        """
        complaint = self._complaint(weights, are_loaded, after_pass)
        if self._exchange.vote(not complaint)[0]:
            return
        said = self._exchange.said(complaint)
        first = next(filter(None, said))
        ranks = [str(rank) for rank, words in enumerate(said) if words == first]
        raise UserError(first if len(ranks) == len(said) else f"{first} (seen on rank {', '.join(ranks)} alone)")

    def _complaint(self, weights: bool, are_loaded: bool, after_pass: bool) -> str:
        """What is wrong as this rank sees it; empty if nothing is."""
        if after_pass and any(layer.is_bypassed for layer in self._keeping):
            assert self._model is not None
            return _about(BYPASSED, bypassed_layers(self._model))
        # Names take longer than all else here, and are for a complaint alone.
        parameters = self._trained.values() if self._model is None else self._model.parameters()
        if {id(p) for p in parameters if p.requires_grad} != self._ids:
            complaint = self._of_another_set()
            if complaint:
                return complaint
        if [_place(p) for p in self._trained.values()] != self._places:
            places = zip(self._trained.items(), self._places, strict=True)
            return _about(MOVED, [name for (name, p), place in places if _place(p) != place])
        if weights:
            return _about(WRITTEN, written(self._shard, are_loaded=are_loaded))
        return ""

    def _of_another_set(self) -> str:
        parameters = list(self._trained.items() if self._model is None else named_parameters(self._model))
        here = {id(p) for _, p in parameters}
        frozen = [n for n, p in self._trained.items() if not p.requires_grad and id(p) in here]
        # One without elements has nothing to train, and some engines leave it out.
        unheld = [n for n, p in parameters if p.requires_grad and id(p) not in self._ids and 0 not in logical_shape(p)]
        gone = [n for n, p in self._trained.items() if id(p) not in here]
        return _about(FROZEN, frozen) or _about(UNHELD, unheld) or _about(GONE, gone)


def written(shard: Shard, *, are_loaded: bool = False) -> list[str]:
    """Names of the parameters of which a weight, on this rank, is not the master in the weight's dtype.

    Args:
        shard: the masters.
        are_loaded: allow weights that a run in bf16 or fp16 has rounded, whatever dtype they have now.
    """
    by_way_of = (None, torch.bfloat16, torch.float16) if are_loaded else (None,)
    found = (twin.name for twin in shard.twins() if not any(_is_cast(twin, dtype) for dtype in by_way_of))
    return list(dict.fromkeys(found))


def _place(parameter: Tensor) -> tuple[torch.dtype, int | None]:
    """Where a parameter lies; one that the engine cuts comes and goes."""
    return parameter.dtype, None if is_partitioned(parameter) else parameter.data_ptr()


def _about(words: str, names: list[str]) -> str:
    return words.format(names=some_of(names, SHOWN)) if names else ""


def _is_cast(twin: Twin, by_way_of: torch.dtype | None) -> bool:
    """Whether a weight is its master, rounded to one dtype and then to its own."""
    parts = zip(twin.weight.split(CHUNK), twin.master.split(CHUNK), strict=True)
    return all(_same(w.to(m.device), (m if by_way_of is None else m.to(by_way_of)).to(w.dtype)) for w, m in parts)


def _same(first: Tensor, second: Tensor) -> bool:
    """Whether two flat tensors of one dtype hold the same values, NaN included."""
    # As integers, and as wide ones as can be: torch compares floating-point numbers at half the speed or less.
    bits = (_as_integers(first), _as_integers(second))
    if bits[0].dtype == bits[1].dtype and torch.equal(*bits):
        return True
    return bool(((first == second) | (first.isnan() & second.isnan())).all())


def _as_integers(flat: Tensor) -> Tensor:
    size = flat.element_size()
    if (flat.numel() * size) % 8 == 0 and (flat.storage_offset() * size) % 8 == 0:
        return flat.view(torch.int64)
    return flat.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[size])
