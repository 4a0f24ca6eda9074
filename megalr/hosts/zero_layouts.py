"""Reading ZeRO's layouts: which part of which parameter lies where in the ranks' flat fp32 buffers.

- **Stages 1 and 2, and BF16_Optimizer**: the parameters of a group are views into one flat low-precision tensor, which
  is cut into equal parts; the fp32 master of part k is the group's only "parameter" on rank k. A parameter's place is
  read from its view's storage offset. The places in ``_hp_mapping`` are not used: with ``round_robin_gradients`` they
  are those that the parameter would have without reordering.
- **Stage 3**: each parameter is cut into world-size equal chunks, padded at the end; chunks of a sub-group are
  concatenated into one flat fp32 tensor. ``param._z3_optimizer`` holds the sub-groups.
- **Stage 0**: whole tensors on every rank, either the model's own (fp32) or one fp32 master each (bf16).

Only the layout of this rank's group is needed to know every rank's, so nothing is communicated.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megalr.errors import UserError
from megalr.hosts.base import NamedGroup
from megalr.hosts.plain import read_whole
from megalr.layout.layout import Fragment, Layout
from megalr.layout.planned import chunks, parts
from megalr.layout.shard import Shard, Twin

CUT = "a parameter at ZeRO stage 3"
FLAT = "a parameter at ZeRO stages 1 and 2"
# Our marks of how stage 1 adds gradients up; see deepspeed_watch.py.
IN_ANY_ORDER, IN_LAST_PASS = "megalr_reduced_in_any_order", "megalr_reduced_in_last_pass"
RECORD = "a record in a parameter's _hp_mapping"
STAGE_3 = "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3"
OFFLOAD = "deepspeed.runtime.zero.parameter_offload.DeepSpeedZeRoOffload"
GROUPS = "deepspeed.utils.groups"

# What this file reads of DeepSpeed, by whose it is; held by tests/deepspeed/test_contract.py.
INTERNALS = {
    CUT: (
        "ds_id",
        "ds_shape",
        "ds_numel",
        "ds_tensor",
        "ds_process_group",
        "ds_secondary_tensor",
        "ds_zero_param_process_group",
        "partition_numel",
        "_z3_optimizer",
    ),
    FLAT: ("_hp_mapping", "_dp_group"),
    "a parameter of DeepSpeedZeroOptimizer": ("grad_accum",),
    RECORD: ("gradient_dict",),
    STAGE_3: (
        "dp_process_group",
        "fp16_groups",
        "fp16_partitioned_groups_flat",
        "fp32_partitioned_groups_flat",
        "parameter_offload",
        "swap_optimizer",
    ),
    OFFLOAD: ("zero_quantized_weights",),
    GROUPS: ("mpu",),
    "the mpu that DeepSpeed was given": ("get_data_parallel_group",),
}


def read_shard(named_groups: Sequence[NamedGroup], param_groups: Sequence[dict[str, Any]]) -> Shard:
    """Find out how DeepSpeed has cut the parameters over this rank's data-parallel group.

    Args:
        named_groups, param_groups: see :meth:`~megalr.hosts.base.Host.read`.

    Raises:
        RuntimeError: the buffers do not hold what this reading says; DeepSpeed's layout has changed.
        UserError: parameters or states lie on NVMe.
    """
    parameters = [p for group in named_groups for p in group.values()]
    for has_mark, read in ((is_cut, _read_stage_3), (is_flat, _read_flat_groups)):
        # One that was frozen, or a user has put in another's place, has none.
        marked = next(filter(has_mark, parameters), None)
        if marked is not None:
            return read(named_groups, param_groups, marked)
    return _read_stage_0(named_groups, param_groups)


def is_cut(parameter: Tensor) -> bool:
    """Whether stage 3, or ``zero.Init`` for it, has cut the parameter; also while it is gathered."""
    return hasattr(parameter, "ds_id")


def is_flat(parameter: Tensor) -> bool:
    """Whether stage 1 or 2 has made the parameter a view into a flat tensor."""
    return hasattr(parameter, "_hp_mapping")


def is_in_engine(parameter: Tensor) -> bool:
    """Whether an engine at stages 1 to 3 keeps the parameter; ``zero.Init`` alone is none."""
    return is_flat(parameter) or hasattr(parameter, "_z3_optimizer")


def shape_of(parameter: Tensor) -> tuple[int, ...]:
    """The shape of the whole parameter; stage 3 leaves an empty tensor and keeps the shape beside it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def is_gathered(parameter: Tensor) -> bool:
    """Whether all of the parameter's elements are in its ``.data`` now."""
    return parameter.numel() == getattr(parameter, "ds_numel", parameter.numel())


def held(parameter: Tensor) -> list[tuple[int, Tensor]]:
    """See :meth:`~megalr.hosts.base.Host.held`: at stage 3 the rank's chunk, and the whole while it is gathered."""
    whole = (0, parameter.data.view(-1))
    if not is_cut(parameter):
        return [whole]
    sharded: Any = parameter
    chunk = sharded.partition_numel()
    start = dist.get_rank(sharded.ds_process_group) * chunk
    own = sharded.ds_tensor.data.view(-1)[: max(0, min(chunk, sharded.ds_numel - start))]
    return [(start, own), *([whole] if is_gathered(parameter) else [])]


def secondary(parameter: Tensor) -> list[tuple[int, Tensor]]:
    """The part of a parameter that ``zero_hpz_partition_size`` has this rank keep for its node to gather from."""
    sharded: Any = parameter
    copy = getattr(sharded, "ds_secondary_tensor", None)
    if copy is None:
        return []
    start = dist.get_rank(sharded.ds_zero_param_process_group) * copy.numel()
    return [(start, copy.data.view(-1)[: max(0, min(copy.numel(), sharded.ds_numel - start))])]


def drop_secondary(parameters: Iterable[Tensor]) -> None:
    """Have parameters gathered from the ranks' own parts, which have been written, and hpZ's copies made again.

    DeepSpeed does so itself for trained parameters.
    """
    for parameter in parameters:
        sharded: Any = parameter
        if getattr(sharded, "ds_secondary_tensor", None) is not None:
            sharded.ds_secondary_tensor = None


def data_parallel_group() -> dist.ProcessGroup | None:
    """The ranks that have the same parameters: all of them, unless DeepSpeed was told of model parallelism."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    mpu = told_of_parallelism()
    group: dist.ProcessGroup | None = dist.group.WORLD if mpu is None else mpu.get_data_parallel_group()
    return group


def told_of_parallelism() -> Any:
    """The ``mpu`` that DeepSpeed was given; None without one, or without DeepSpeed, which is not imported here."""
    return getattr(sys.modules.get(GROUPS), "mpu", None)


def _read_stage_3(named_groups: Sequence[NamedGroup], param_groups: Sequence[dict[str, Any]], first: Any) -> Shard:
    zero = first._z3_optimizer
    names = {id(p): name for group in named_groups for name, p in group.items()}
    group = getattr(first, "ds_process_group", None) or zero.dp_process_group
    world_size = dist.get_world_size(group)
    rank = dist.get_rank(group)
    shapes: dict[str, tuple[int, ...]] = {}
    fragments: list[Fragment] = []
    buffers = list(zero.fp32_partitioned_groups_flat)
    for buffer, parameters in enumerate(zero.fp16_groups):
        offset = 0
        for parameter in parameters:
            name = names[id(parameter)]
            shapes[name] = tuple(parameter.ds_shape)
            chunk = parameter.partition_numel()
            cut = chunks(name, parameter.ds_numel, chunk, buffer, offset)
            fragments += cut
            # The padding is uninitialized memory, perhaps NaN: nothing reads it today, and nothing ever should.
            length = sum(f.length for f in cut if f.rank == rank)
            buffers[buffer].data[offset + length : offset + chunk].zero_()
            offset += chunk

    weights = zero.fp16_partitioned_groups_flat
    if zero.swap_optimizer or any(flat is None for flat in weights):
        raise UserError(
            'parameters or optimizer state on NVMe cannot be updated: write "device": "cpu" for the offload'
        )

    def publish(buffer: int) -> None:
        weights[buffer].data.copy_(buffers[buffer].data)

    parameters = {name: p for named in named_groups for name, p in named.items()}
    mine = [fragment for fragment in fragments if fragment.rank == rank]
    quantized = zero.parameter_offload.zero_quantized_weights  # what is gathered is rounded, then

    def twins() -> list[Twin]:
        found = []
        for f in mine:
            (_, chunk), *whole = held(parameters[f.name])
            weights = [chunk, *(flat[f.start : f.start + f.length] for _, flat in whole if not quantized)]
            found += [Twin(f.name, weight, _master(buffers, f)) for weight in weights]
        return found

    for f in mine:
        _verify(f.name, held(parameters[f.name])[0][1], _master(buffers, f))
    layout = Layout(world_size, shapes, fragments)
    return Shard(layout, [b.data for b in buffers], buffers, rank, group, publish, twins=twins)


def _read_flat_groups(named_groups: Sequence[NamedGroup], param_groups: Sequence[dict[str, Any]], first: Any) -> Shard:
    group = first._dp_group
    world_size = dist.get_world_size(group)
    rank = dist.get_rank(group)
    shapes: dict[str, tuple[int, ...]] = {}
    fragments: list[Fragment] = []
    masters = [param_group["params"][0] for param_group in param_groups]
    for buffer, (named, master) in enumerate(zip(named_groups, masters, strict=True)):
        part = master.numel()
        for name, parameter in named.items():
            if not is_flat(parameter):
                continue
            shapes[name] = tuple(parameter.shape)
            begin = int(parameter.data.storage_offset())
            fragments += parts(name, begin, parameter.numel(), part, buffer)
    layout = Layout(world_size, shapes, fragments)
    parameters = {name: p for named in named_groups for name, p in named.items()}
    mine = [fragment for fragment in fragments if fragment.rank == rank]

    def own_weights(fragment: Fragment) -> Tensor:
        flat = parameters[fragment.name].data.view(-1)
        return flat[fragment.start : fragment.start + fragment.length]

    def publish(buffer: int) -> None:
        for fragment in mine:
            if fragment.buffer == buffer:
                own_weights(fragment).copy_(_master(masters, fragment))

    def twins() -> list[Twin]:
        return [Twin(f.name, own_weights(f), _master(masters, f)) for f in mine]

    for twin in twins():
        _verify(*vars(twin).values())
    # The records of any parameter that has a fragment here lead to the averaged gradients of all groups.
    mappings = [getattr(p, "_hp_mapping", None) for p in parameters.values()]
    mapping = next((found for found in mappings if found is not None), None)

    def unseen() -> list[Tensor]:
        groups = [] if mapping is None else mapping.gradient_dict.values()
        return [grad for grads in groups if grads is not None for grad in grads if grad is not None]

    # BF16_Optimizer, whose parameters have no grad_accum, adds up whole buffers.
    ordered = hasattr(first, "grad_accum") and not hasattr(first, IN_ANY_ORDER)
    every_pass = hasattr(first, IN_LAST_PASS)
    return Shard(
        layout,
        [m.data for m in masters],
        masters,
        rank,
        group,
        publish,
        unseen,
        ordered=ordered,
        every_pass=every_pass,
        twins=twins,
    )


def _read_stage_0(named_groups: Sequence[NamedGroup], param_groups: Sequence[dict[str, Any]]) -> Shard:
    shard = read_whole(named_groups, param_groups, data_parallel_group())
    own = {id(p) for named in named_groups for p in named.values()}
    if all(id(parameter) in own for parameter in shard.parameters):
        return shard
    # bf16: a wrapper keeps the masters, looks at the gradients itself, and makes a call to have states created.
    return replace(shard, unseen_gradients=None, dry_run=True)


def _master(masters: Sequence[Tensor], fragment: Fragment) -> Tensor:
    return masters[fragment.buffer].data[fragment.offset : fragment.offset + fragment.length]


def _verify(name: str, weights: Tensor, master: Tensor) -> None:
    """The model's weights are the masters cast down: if not, training on would silently mix parameters up."""
    if not torch.equal(weights, master.to(weights)):
        raise RuntimeError(
            f"the flat fp32 buffer does not hold {name} where it was expected. Either the weight was written after "
            "deepspeed.initialize: write it before, or call optimizer.prepare() right after deepspeed.initialize, and "
            "megalr.adopt_weights(engine) once it is written. Or this DeepSpeed release lays parameters out in another "
            "way than megalr.hosts.zero_layouts reads them"
        )
