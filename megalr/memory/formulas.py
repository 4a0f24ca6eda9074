"""Bytes of weights, gradients, fp32 masters and optimizer state, by formula and as measured on an engine.

There are two ways of counting. :func:`paper_bytes` is the literature's: everything in bf16, neither
gradients nor masters, one device. :func:`deepspeed_bytes` is what one rank holds under DeepSpeed, padding
included; :func:`measured_bytes` sums an engine's own tensors, and the tests hold the two equal, byte for
byte.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from megalr.hosts import host_of, logical_shape
from megalr.layers import factor_names
from megalr.layers.base import ParametrizationConfig, kept_buffers
from megalr.layers.replacement import replaced_layers
from megalr.layout.planned import PADDING
from megalr.naming import named_parameters, submodule

Shape = Sequence[int]
Storages = set[tuple[torch.device, int]]

ADAM_STATE_FLOATS = 2  # first and second moment
PERSISTENCE_THRESHOLD = 100_000  # DeepSpeed's default of stage3_param_persistence_threshold


@dataclass(frozen=True)
class ParameterRecord:
    """What the formulas need to know of one trainable parameter.

    Attributes:
        name: its qualified name.
        shape: its logical shape.
        kind: "factor" for what a low-rank layer trains, "dense" for everything else.
    """

    name: str
    shape: tuple[int, ...]
    kind: Literal["dense", "factor"] = "dense"

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class RankBytes:
    """Bytes that one rank holds, in four parts. A tensor that serves as two of them counts in the first."""

    weights: int
    gradients: int
    masters: int
    optimizer_state: int

    @property
    def total(self) -> int:
        """All four together."""
        return self.weights + self.gradients + self.masters + self.optimizer_state


def records(model: nn.Module) -> list[ParameterRecord]:
    """A record of every trainable parameter of ``model``, in its order, shared ones once.

    The model may lie on the meta device, or have been cut up by ZeRO-3.
    """
    factors = set(factor_names(model))
    return [
        ParameterRecord(name, logical_shape(parameter), "factor" if name in factors else "dense")
        for name, parameter in named_parameters(model)
        if parameter.requires_grad
    ]


def frozen_shapes(model: nn.Module) -> list[tuple[int, ...]]:
    """The shapes of the parameters that are not trained, shared ones once."""
    return [logical_shape(parameter) for parameter in model.parameters() if not parameter.requires_grad]


def merged_shapes(model: nn.Module, parametrization: ParametrizationConfig) -> list[tuple[int, ...]]:
    """The shapes of the frozen weights that will have a remainder: empty for any other ``merge_rounding``.

    Args:
        model: with its layers replaced; on the meta device, if need be.
        parametrization: the section that it was replaced by.
    """
    if getattr(parametrization, "merge_rounding", "") != "remainder":
        return []
    layers = replaced_layers(model).values()
    # A layer whose factors are not trained is never merged; nor does a bias alone make it one that is.
    merged = [
        layer
        for layer in layers
        if any(p.requires_grad for name, p in layer.named_parameters(recurse=False) if name != "bias")
    ]
    return [logical_shape(layer.get_parameter("weight")) for layer in merged]


def buffer_bytes(model: nn.Module) -> int:
    """Bytes of what the layers keep beside parameters: the indices of SLTrain's values, 4 bytes each."""
    return sum(buffer.numel() * buffer.element_size() for buffer in kept_buffers(model))


def paper_bytes(
    parameters: nn.Module | Iterable[ParameterRecord],
    *,
    treated_state: Callable[[ParameterRecord], int | None] | None = None,
) -> int:
    """Memory as the papers on low-rank pretraining count it: weights and optimizer state in bf16, one device.

    That is 2 bytes for every weight, 4 for every parameter under plain Adam, and 2 for every float of state,
    projector included, of a matrix that has a rule of its own. Gradients, masters and activations do not
    count. A low-rank model is plain Adam on its factors: 6 bytes for each of its parameters. What is frozen, such as
    W0 and Q of projected layers, counts as the weight it is, and indices with 4 bytes.

    Args:
        parameters: a model (on the meta device, if need be), or records of trained parameters.
        treated_state: how many floats of state a parameter's own rule keeps; None for plain Adam.
    """
    listed = records(parameters) if isinstance(parameters, nn.Module) else list(parameters)
    total = 0
    if isinstance(parameters, nn.Module):
        total = 2 * sum(map(math.prod, frozen_shapes(parameters))) + buffer_bytes(parameters)
    for record in listed:
        state = treated_state(record) if treated_state is not None else None
        total += 2 * record.numel + 2 * (ADAM_STATE_FLOATS * record.numel if state is None else state)
    return total


def deepspeed_bytes(
    groups: Sequence[Sequence[Shape]],
    *,
    stage: int,
    world_size: int,
    rank: int = 0,
    dtype: torch.dtype = torch.float32,
    gradient_dtype: torch.dtype | None = None,
    persistence_threshold: int = PERSISTENCE_THRESHOLD,
    treated: Collection[int] = (),
    treated_bytes: int = 0,
    frozen: Sequence[Shape] = (),
    buffers: int = 0,
    merged: Sequence[Shape] = (),
) -> RankBytes:
    """Bytes that one rank holds under DeepSpeed 0.19.8 with AdamW and no offload, padding included.

    - weights: the model's parameters, in ``dtype``. Stage 0: as they are. Stages 1 and 2: each group flat,
      padded to 2 x world size. Stage 3: this rank's part of each parameter, padded to the world size; and
      from the first step on, beside it, a gathered copy of every parameter of at most
      ``persistence_threshold`` elements.
    - masters: fp32 copies of the weights. Stage 0: whole, or none where the model is fp32. Stages 1 and 2:
      this rank's part of each group. Stage 3: this rank's parts. From stage 1 on an fp32 model is copied
      too. (At stage 3 DeepSpeed means to spare it that, but compares a ``torch.device`` with a string, so
      never does.)
    - optimizer_state: two fp32 moments for each element that is stepped, from the first step on; for groups with a
      rule of their own its state instead. Scalars, such as step counts, are left out. In bf16, from its first merge
      on, the remainder of each merged weight besides: whole at stage 0, one world-th of it at the others.
    - gradients: what is kept from one micro-batch of a step to the next. Stage 0: all. Stage 1: all, since
      each rank accumulates its own, and they are averaged once, in the last backward. Stage 2: the averaged
      gradients of the parameters of which this rank holds any part, each of them whole. Stage 3: this rank's
      part, for good. Where a bf16 model's gradients accumulate in fp32, stage 1 has a padded fp32 buffer
      besides, and stage 2 this rank's part of every group in which it holds more than padding.

    Left out is what lives for less than a micro-batch: activations, buffers to reduce and gather in, a
    micro-batch's gradients before they are added, and the fp32 copy of bf16 gradients that a step makes (of
    one group at a time; at stage 0 of all). Left out, too, is stage 3's reduction bucket, which stays:
    ``reduce_bucket_size`` elements of the communication dtype.

    Args:
        groups: the shapes in each of the optimizer's param groups, in order. Trainable parameters only; buffers come
            on top.
        stage: ZeRO stage, 0 to 3.
        world_size: how many ranks share the partitions.
        rank: whose bytes. Ranks differ in the gradients of stage 2, and in remainders: the last rank's may be shorter.
        dtype: the model's, fp32 or bf16.
        gradient_dtype: ``data_types.grad_accum_dtype`` of the DeepSpeed JSON; None stands for the model's.
        persistence_threshold: ``stage3_param_persistence_threshold`` of the DeepSpeed JSON.
        treated: indices of the groups that a rule of their own updates, and that so have none of Adam's moments.
        treated_bytes: of state, scalars left out, that this rank keeps for them: it depends on who owns what.
        frozen: the shapes of parameters that are not trained. They are weights and nothing else, whole on every rank
            except at stage 3.
        buffers: bytes of what layers keep beside parameters, see :func:`buffer_bytes`; whole on every rank.
        merged: the shapes of those of ``frozen`` that have a remainder, see :func:`merged_shapes`.

    Raises:
        ValueError: an unknown stage, a rank outside the world, or a gradient dtype that DeepSpeed refuses.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank}, but a world of {world_size} has ranks 0 to {world_size - 1}")
    numels = [[math.prod(shape) for shape in group] for group in groups]
    fixed = [math.prod(shape) for shape in frozen]
    gradient_dtype = gradient_dtype or dtype
    match stage:
        case 0:
            if gradient_dtype != dtype:
                raise ValueError(f"stage 0 keeps gradients in the model's {dtype}, not in {gradient_dtype}")
            parts = [sum(group) for group in numels]
            held = sum(parts)
            gradients = held * dtype.itemsize
        case 1 | 2:
            parts = [math.ceil(sum(group) / (PADDING * world_size)) * PADDING for group in numels]
            held = sum(parts) * world_size
            mixed = gradient_dtype != dtype
            if stage == 1:
                gradients = sum(map(sum, numels)) * dtype.itemsize + mixed * held * gradient_dtype.itemsize
            else:
                kept = [_touched(group, part * rank, part) for group, part in zip(numels, parts, strict=True)]
                if mixed:
                    kept = [part if here else 0 for part, here in zip(parts, kept, strict=True)]
                gradients = sum(kept) * gradient_dtype.itemsize
        case 3:
            parts = [sum(math.ceil(n / world_size) for n in group) for group in numels]
            held = sum(parts) + _gathered([*numels, fixed], world_size, persistence_threshold)
            fixed = [math.ceil(n / world_size) for n in fixed]
            gradients = sum(parts) * gradient_dtype.itemsize
        case _:
            raise ValueError(f"stage is {stage}; ZeRO has the stages 0, 1, 2 and 3")
    plain = sum(part for index, part in enumerate(parts) if index not in treated)
    return RankBytes(
        weights=(held + sum(fixed)) * dtype.itemsize + buffers,
        gradients=gradients,
        masters=0 if stage == 0 and dtype == torch.float32 else 4 * sum(parts),
        optimizer_state=4 * ADAM_STATE_FLOATS * plain
        + treated_bytes
        + _remainder_bytes(merged, stage=stage, world_size=world_size, rank=rank, dtype=dtype),
    )


def expected_bytes(engine: Any) -> RankBytes:
    """:func:`deepspeed_bytes` for a live DeepSpeed engine's groups, stage, dtypes, world size and rank."""
    host = host_of(engine)
    optimizer, groups, ranks = host.optimizer, host.parameter_groups(), host.groups()
    dtype, gradient_dtype = host.dtypes
    own = {id(parameter) for parameter in getattr(optimizer, "matrix_parameters", ())}
    merged = [submodule(host.module, layer) for layer in getattr(optimizer, "remainders", ())]
    return deepspeed_bytes(
        [[logical_shape(parameter) for parameter in group] for group in groups],
        stage=host.stage,
        world_size=ranks.data_size,
        rank=ranks.data_rank,
        dtype=dtype,
        gradient_dtype=gradient_dtype,
        persistence_threshold=host.persistence_threshold,
        # No flat buffer holds both matrices of a rule and other parameters.
        treated=[index for index, group in enumerate(groups) if own.issuperset(map(id, group))],
        treated_bytes=optimizer.matrix_state_bytes if own else 0,
        frozen=frozen_shapes(host.module),
        buffers=buffer_bytes(host.module),
        merged=[logical_shape(layer.get_parameter("weight")) for layer in merged],
    )


def measured_bytes(engine: Any) -> RankBytes:
    """What a live DeepSpeed engine's tensors take on this rank: whole storages, each counted once.

    Equal to :func:`expected_bytes` between two micro-batches of a step, from the second step on. Once a step
    is over, stages 0 to 2 have freed their gradients; before the first there is no optimizer state. At stage
    3 an evaluation leaves parameters gathered until the next step, and they count as the weights they are.
    """
    host = host_of(engine)
    optimizer, kept = host.optimizer, host.tensors()
    seen: Storages = set()
    weights = _storage_bytes([kept.weights, kept_buffers(host.module)], seen)
    masters = _storage_bytes(kept.masters, seen)
    state = _storage_bytes(list(optimizer.state.values()), seen)
    state += _storage_bytes(getattr(optimizer, "matrix_states", {}), seen)
    state += _storage_bytes(getattr(optimizer, "remainders", {}), seen)
    gradients = _storage_bytes(kept.gradients, seen)
    return RankBytes(weights=weights, gradients=gradients, masters=masters, optimizer_state=state)


def _touched(numels: Sequence[int], first: int, length: int) -> int:
    """Elements of all parameters, laid end to end, that have at least one in [first, first + length)."""
    ends = itertools.accumulate(numels)
    return sum(n for n, end in zip(numels, ends, strict=True) if first < end and end - n < first + length)


def _remainder_bytes(merged: Sequence[Shape], *, stage: int, world_size: int, rank: int, dtype: torch.dtype) -> int:
    """Of a rank, of what :class:`~megalr.optim.frozen_weights.FrozenWeights` keeps of merged weights; none in fp32."""
    if dtype == torch.float32:
        return 0
    numels = [math.prod(shape) for shape in merged]
    if stage == 0:
        return sum(numels) * dtype.itemsize
    chunks = [(n, math.ceil(n / world_size)) for n in numels]
    return sum(min(n, (rank + 1) * chunk) - min(n, rank * chunk) for n, chunk in chunks) * dtype.itemsize


def _gathered(numels: Sequence[Sequence[int]], world_size: int, threshold: int) -> int:
    """Elements of the small parameters that stage 3 keeps whole; in a world of one the part is the whole."""
    if world_size == 1:
        return 0
    return sum(math.ceil(n / world_size) * world_size for group in numels for n in group if n <= threshold)


def _storage_bytes(tree: Any, seen: Storages) -> int:
    """Bytes of all storages in ``tree`` that are not yet in ``seen``, which is modified in place."""
    total = 0
    for tensor in _tensors(tree):
        storage = tensor.untyped_storage()  # a view keeps all of it alive
        key = (tensor.device, storage.data_ptr())
        # A scalar is a step count. An empty storage has no address of its own.
        if tensor.ndim and storage.nbytes() and key not in seen:
            seen.add(key)
            total += storage.nbytes()
    return total


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        yield from _tensors(list(tree.values()))
    elif isinstance(tree, list | tuple):
        for item in tree:
            yield from _tensors(item)
