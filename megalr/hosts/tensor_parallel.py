"""Tensor parallelism: which parameters it cuts, and one layout for all ranks of tensor x data parallelism.

Read from the marks that DeepSpeed's AutoTP leaves on what it has cut, or Megatron-LM's layers on theirs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megalr.errors import UserError
from megalr.hosts.base import NamedGroup
from megalr.hosts.reading import read_shard
from megalr.layout.shard import Shard
from megalr.layout.tensor_parallel import join

T = TypeVar("T")

AUTOTP = "ds_autotp_universal_checkpoint_meta"


def read_shards(named_groups: Sequence[NamedGroup], param_groups: Sequence[dict[str, Any]]) -> tuple[Shard, Shard]:
    """:func:`~megalr.hosts.reading.read_shard`, and the same in what all tensor-parallel ranks hold; collective there.

    At stage 0, where data-parallel ranks all have the same, only tensor-parallel ranks are put together: every
    replica does the same work, and what cannot be computed twice alike is agreed upon over the data-parallel group.

    Returns:
        ``(local, whole)``: the data-parallel group's, with this rank's parts of what tensor parallelism has cut, and
        that of all ranks, with whole parameters; twice the same without tensor parallelism.
    """
    local = read_shard(named_groups, param_groups)
    parameters = {name: p for named in named_groups for name, p in named.items()}
    cuts = tensor_parallel_cuts({name: parameters[name] for name in local.layout.shapes})
    if not cuts:
        return local, local
    tensor_group = _tensor_group()
    layout, group, replicas = local.layout, local.group, None
    if local.replicated:
        own = [replace(f, rank=0, copy=0) for f in layout.fragments if f.rank == local.rank]
        layout, group, replicas = replace(layout, world_size=1, fragments=own), None, group
    me = dist.get_rank()
    _check_groups(tensor_group, local.group)
    parts = _of_all(([me] if group is None else dist.get_process_group_ranks(group), layout), tensor_group)
    everyone = tensor_group if layout.world_size == 1 else _group_of_all()
    index = {rank: i for i, rank in enumerate(dist.get_process_group_ranks(everyone))}
    whole = join([part for _, part in parts], cuts, [[index[rank] for rank in ranks] for ranks, _ in parts])
    return local, replace(
        local,
        layout=whole,
        rank=index[me],
        group=everyone,
        replicas=replicas,
        is_first_copy=dist.get_rank(tensor_group) == 0,
        is_first_replica=replicas is not None or local.rank == 0,
    )


def tensor_parallel_cuts(parameters: Mapping[str, Tensor]) -> dict[str, int]:
    """The dimension in which tensor parallelism cuts each parameter that it cuts; the others are copies.

    Raises:
        UserError: a parameter is cut in a way that is not one run of rows or columns a rank.
    """
    cuts: dict[str, int] = {}
    for name, parameter in parameters.items():
        marks: dict[str, Any] = getattr(parameter, AUTOTP, None) or {}
        if any(marks.get(key) for key in ("unsupported_reason", "sub_param_shape", "sub_param_shard_widths")):
            raise UserError(
                f"tensor parallelism gives each rank several pieces of {name}, as of fused projections; rows or "
                "columns in one piece are needed: use a model with separate projections"
            )
        megatron = getattr(parameter, "tensor_model_parallel", False)
        dim = marks.get("partition_dim") if marks or not megatron else getattr(parameter, "partition_dim", None)
        if dim is not None and not marks.get("replicated"):
            cuts[name] = int(dim)
    return cuts


def whole_frozen(name: str, parameter: Tensor) -> Tensor:
    """A frozen parameter on the CPU, put together from the parts of all tensor-parallel ranks; collective."""
    own, cut = parameter.detach().cpu().clone(), tensor_parallel_cuts({name: parameter})
    return joined(own, cut[name]) if cut else own


def joined(part: Tensor, dim: int) -> Tensor:
    """What the tensor-parallel ranks have parts of, on the CPU; collective over them."""
    return torch.cat(_of_all(part.detach().cpu(), _tensor_group()), dim=dim)


def part_offset(name: str, parameter: Tensor) -> tuple[tuple[int, int], tuple[int, ...]]:
    """Where this rank's part of a parameter begins in the whole, and the whole's shape; collective if it is cut.

    Returns:
        ``((first row, first column), shape)``; of a vector the first element.
    """
    size, cut = list(_size(parameter)), tensor_parallel_cuts({name: parameter})
    if not cut:
        return (0, 0), tuple(size)
    dim = cut[name]
    if hasattr(parameter, "megalr_part"):
        _, first, size[dim] = parameter.megalr_part
    else:
        group = _tensor_group()
        parts = _of_all(size[dim], group)
        first, size[dim] = sum(parts[: dist.get_rank(group)]), sum(parts)
    return (first, 0) if dim == 0 else (0, first), tuple(size)


def mark_cut(parameter: Any, dim: int, part: tuple[int, int] | None = None) -> None:
    """Mark a parameter as this rank's part of one that tensor parallelism has cut, for DeepSpeed and for us.

    Args:
        parameter: the part.
        dim: the dimension that is cut.
        part: where it begins there, and how many the whole has; None where it is not one run.
    """
    parameter.tensor_model_parallel, parameter.partition_dim = True, dim  # so its norm is counted on every rank
    setattr(parameter, AUTOTP, {"partition_dim": dim, "replicated": False})
    if part is not None:
        parameter.megalr_part = (dim, *part)


def mark_gradients(parameters: Iterable[Tensor]) -> None:
    """From now on, mark the gradients of those parameters that are marked as cut.

    At stage 0 in bf16 and fp16 DeepSpeed takes the norm for clipping of a list of gradients, not of parameters, and
    leaves out on all tensor-parallel ranks but the first what is not marked as cut there: every gradient, if nobody
    marks them. All other stages, and fp32, look at the parameters.
    """
    for parameter in parameters:
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_mark_gradient)


def _mark_gradient(parameter: Any) -> None:
    # Asked here, since AutoTP cuts and marks its layers later than the hook is made.
    if parameter.grad is not None and getattr(parameter, "tensor_model_parallel", False):
        parameter.grad.tensor_model_parallel = True


def own_part(parameter: Any, whole: Tensor) -> Tensor:
    """A view of this rank's part of a tensor that is cut as a parameter is; all of it where that is not cut."""
    if not hasattr(parameter, "megalr_part"):
        return whole
    dim, first, _ = parameter.megalr_part
    return whole.narrow(dim, first, _size(parameter)[dim])


def in_whole(parameter: Any, own: Tensor) -> Tensor:
    """The opposite: zeros but for this rank's part."""
    if not hasattr(parameter, "megalr_part"):
        return own
    dim, _, size = parameter.megalr_part
    whole = own.new_zeros([size if d == dim else n for d, n in enumerate(own.shape)])
    own_part(parameter, whole).copy_(own)
    return whole


def mark_indices(parameter: Any, places: Tensor) -> None:
    """Mark a cut vector whose elements are not one run of the whole with the places, int64, that they have there."""
    parameter.megalr_indices = places


def indices_in_whole(parameter: Tensor) -> Tensor | None:
    """Where in the whole the elements of a cut vector belong, of all ranks' parts behind each other; collective.

    None where they are in their order.
    """
    mine = getattr(parameter, "megalr_indices", None)
    if mine is None:
        return None
    return torch.cat(_of_all(mine, _tensor_group()))


def tensor_parallel_rank() -> int:
    """Which of the tensor-parallel ranks that DeepSpeed was told of this one is."""
    return dist.get_rank(_tensor_group())


def _size(parameter: Any) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _of_all(mine: T, group: dist.ProcessGroup) -> list[T]:
    """Every rank's picklable value, in the group's order; collective."""
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, mine, group=group)
    return values


def _tensor_group() -> dist.ProcessGroup:
    """The tensor-parallel ranks that DeepSpeed was told of."""
    from deepspeed.utils import groups  # noqa: PLC0415  (slow to import, and where it is needed it has been)
    from deepspeed.utils.bwc import bwc_tensor_model_parallel_group  # noqa: PLC0415

    group: dist.ProcessGroup = bwc_tensor_model_parallel_group(groups.mpu)
    return group


def _check_groups(tensor: dist.ProcessGroup, data: dist.ProcessGroup | None) -> None:
    """Raise a UserError where tensor- and data-parallel ranks are not all there are, as with pipeline stages."""
    if dist.get_world_size(tensor) * (1 if data is None else dist.get_world_size(data)) != dist.get_world_size():
        raise UserError("tensor parallelism together with pipeline stages is not supported: use one of them")


def _group_of_all() -> dist.ProcessGroup:
    """The group of all tensor- and data-parallel ranks."""
    group = dist.group.WORLD
    assert group is not None
    return group
