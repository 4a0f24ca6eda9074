"""Reading DeepSpeed's layout: which part of which parameter lies where in the ranks' flat fp32 buffers.

This is the one file of the optimizer that knows how DeepSpeed (0.19) cuts parameters:

- **Stages 1 and 2, and BF16_Optimizer**: the parameters of a group are views into one flat low-precision tensor, which
  is cut into equal parts; the fp32 master of part k is the group's only "parameter" on rank k. A parameter's place is
  read from its view's storage offset. The `_hp_mapping` records are not used: with ``round_robin_gradients`` they name
  the place that the parameter would have without reordering.
- **Stage 3**: each parameter is cut into world-size equal chunks, padded at the end; chunks of a sub-group are
  concatenated into one flat fp32 tensor. ``param._z3_optimizer`` holds the sub-groups.
- **Stage 0**: whole tensors on every rank, either the model's own (fp32) or one fp32 master each (bf16).

Only the layout of this rank's group is needed to know every rank's, so nothing is communicated.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megalr.errors import UserError
from megalr.hosts.base import NamedGroup
from megalr.layout.layout import Fragment, Layout
from megalr.layout.planned import chunks, parts
from megalr.layout.shard import Shard


def read_shard(named_groups: Sequence[NamedGroup], param_groups: Sequence[dict[str, Any]]) -> Shard:
    """Find out how DeepSpeed has cut the parameters.

    Args:
        named_groups: the parameters of each group by qualified name, as they were when the optimizer was built.
        param_groups: the optimizer's groups now, with DeepSpeed's flat tensors (or the parameters) in "params".

    Raises:
        RuntimeError: the buffers do not hold what this reading says; DeepSpeed's layout has changed.
    """
    first = next(p for group in named_groups for p in group.values())
    if hasattr(first, "ds_id"):
        return _read_stage_3(named_groups, first)
    if hasattr(first, "_hp_mapping"):
        return _read_flat_groups(named_groups, param_groups, first)
    return _read_whole(named_groups, param_groups)


def frozen_parts(parameter: Tensor) -> list[tuple[int, Tensor]]:
    """What this rank holds of a parameter that is not trained: (first element, flat view), to be written alike.

    At stage 3 that is the rank's chunk, and the whole parameter where DeepSpeed keeps it gathered; elsewhere the whole.
    """
    if not hasattr(parameter, "ds_id"):
        return [(0, parameter.data.view(-1))]
    sharded: Any = parameter
    chunk = sharded.partition_numel()
    start = dist.get_rank(sharded.ds_process_group) * chunk
    own = sharded.ds_tensor.data.view(-1)[: max(0, min(chunk, sharded.ds_numel - start))]
    gathered = parameter.numel() == sharded.ds_numel
    return [(start, own), *([(0, parameter.data.view(-1))] if gathered else [])]


def _read_stage_3(named_groups: Sequence[NamedGroup], first: Any) -> Shard:
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
            # The padding is uninitialised memory, perhaps NaN: nothing reads it today, and nothing ever should.
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
    for fragment in fragments:
        if fragment.rank == rank:
            own = parameters[fragment.name].ds_tensor.data.view(-1)[: fragment.length]
            _verify(fragment, own, _master(buffers, fragment))
    layout = Layout(world_size, shapes, fragments)
    return Shard(layout, [b.data for b in buffers], buffers, rank, group, publish)


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
            if not parameter.requires_grad:
                continue
            shapes[name] = tuple(parameter.shape)
            begin = int(parameter.data.storage_offset())
            fragments += parts(name, begin, parameter.numel(), part, buffer)
    layout = Layout(world_size, shapes, fragments)
    parameters = {name: p for named in named_groups for name, p in named.items()}
    here = [[f for f in fragments if f.rank == rank and f.buffer == buffer] for buffer in range(len(masters))]

    def own_weights(fragment: Fragment) -> Tensor:
        flat = parameters[fragment.name].data.view(-1)
        return flat[fragment.start : fragment.start + fragment.length]

    def publish(buffer: int) -> None:
        for fragment in here[buffer]:
            own_weights(fragment).copy_(_master(masters, fragment))

    for part in here:
        for fragment in part:
            _verify(fragment, own_weights(fragment), _master(masters, fragment))
    # The records of any parameter that has a fragment here lead to the averaged gradients of all groups.
    mappings = [getattr(p, "_hp_mapping", None) for p in parameters.values()]
    mapping = next((found for found in mappings if found is not None), None)

    def unseen() -> list[Tensor]:
        groups = [] if mapping is None else mapping.gradient_dict.values()
        return [grad for grads in groups if grads is not None for grad in grads if grad is not None]

    return Shard(layout, [m.data for m in masters], masters, rank, group, publish, unseen)


def _read_whole(named_groups: Sequence[NamedGroup], param_groups: Sequence[dict[str, Any]]) -> Shard:
    group = _data_parallel_group()
    world_size = dist.get_world_size(group) if group is not None else 1
    rank = dist.get_rank(group) if group is not None else 0
    shapes: dict[str, tuple[int, ...]] = {}
    fragments: list[Fragment] = []
    buffers: list[Tensor] = []
    weights: list[Tensor] = []
    separate = False
    for named, param_group in zip(named_groups, param_groups, strict=True):
        trainable = {name: p for name, p in named.items() if p.requires_grad}
        # DDP_BFLOAT16 keeps one master for each trainable parameter, in order; fp32 keeps the parameters themselves.
        tensors = [t for t in param_group["params"] if t.requires_grad]
        for (name, parameter), tensor in zip(trainable.items(), tensors, strict=True):
            if parameter.shape != tensor.shape:
                raise RuntimeError(
                    f"expected the master of {name} {tuple(parameter.shape)}, found {tuple(tensor.shape)}"
                )
            separate = separate or tensor is not parameter
            shapes[name] = tuple(parameter.shape)
            fragments += [Fragment(name, 0, parameter.numel(), r, len(buffers), 0, copy=r) for r in range(world_size)]
            buffers.append(tensor)
            weights.append(parameter)
    layout = Layout(world_size, shapes, fragments)
    flat = [b.data.view(-1) for b in buffers]
    # fp32 parameters are stepped without a look at their gradients; the wrapper of bf16 ones does look.
    unseen = None if separate else list

    def publish(buffer: int) -> None:
        if weights[buffer] is not buffers[buffer]:
            weights[buffer].data.copy_(buffers[buffer].data)

    return Shard(layout, flat, buffers, rank, group, publish, unseen, dry_run=separate, replicated=True)


def _data_parallel_group() -> dist.ProcessGroup | None:
    """The ranks that have the same parameters: all of them, unless DeepSpeed was told of model parallelism."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    groups = sys.modules.get("deepspeed.utils.groups")  # not imported: there is no DeepSpeed to have been told
    mpu = getattr(groups, "mpu", None)
    group: dist.ProcessGroup | None = dist.group.WORLD if mpu is None else mpu.get_data_parallel_group()
    return group


def _master(masters: Sequence[Tensor], fragment: Fragment) -> Tensor:
    return masters[fragment.buffer].data[fragment.offset : fragment.offset + fragment.length]


def _verify(fragment: Fragment, weights: Tensor, master: Tensor) -> None:
    """The model's weights are the masters cast down: if not, training on would silently mix parameters up."""
    if not torch.equal(weights, master.to(weights)):
        raise RuntimeError(
            f"the flat fp32 buffer does not hold {fragment.name} where it was expected; this DeepSpeed release lays "
            "parameters out in another way than megalr.hosts.reading reads them"
        )
