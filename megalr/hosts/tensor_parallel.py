"""Tensor parallelism: which parameters it cuts, and one layout for all ranks of tensor x data parallelism.

Read from the marks that DeepSpeed's AutoTP leaves on what it has cut, or Megatron-LM's layers on theirs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalr.errors import UserError
from megalr.hosts.base import NamedGroup
from megalr.hosts.zero_layouts import shape_of, told_of_parallelism
from megalr.layout.shard import Shard
from megalr.layout.tensor_parallel import join
from megalr.schema import Json

T = TypeVar("T")

AUTOTP = "ds_autotp_universal_checkpoint_meta"  # AutoTP's mark, which DeepSpeed's universal checkpoints read

CUT = "a parameter that AutoTP has cut"
MEGATRON = "a parameter that a layer of Megatron-LM has cut"
MARK = "AutoTP's mark on a parameter"
CONVERSION = "AutoTP's mark on a parameter, conversion"
REPLACED = "a module that AutoTP leaves as it is"
BWC = "deepspeed.utils.bwc"

# What this file reads and writes of DeepSpeed and of Megatron-LM's marks; held by tests/deepspeed/test_contract.py.
INTERNALS = {
    CUT: (AUTOTP,),
    MARK: (
        "conversion",
        "partition_dim",
        "partition_sizes",
        "replicated",
        "sub_param_shape",
        "sub_param_shard_widths",
    ),
    CONVERSION: ("affine_map", "unsupported_reason"),
    MEGATRON: ("tensor_model_parallel", "partition_dim"),
    REPLACED: ("replaced",),
    BWC: ("bwc_tensor_model_parallel_group", "bwc_tensor_model_parallel_world_size"),
}


def joined_shards(local: Shard, named_groups: Sequence[NamedGroup]) -> tuple[Shard, Shard]:
    """A data-parallel group's shard, and the same in what all tensor-parallel ranks hold; collective there.

    At stage 0, where data-parallel ranks all have the same, only tensor-parallel ranks are put together: every
    replica does the same work, and what cannot be computed twice alike is agreed upon over the data-parallel group.

    Args:
        local: the data-parallel group's, with this rank's parts of what tensor parallelism has cut.
        named_groups: see :meth:`~megalr.hosts.base.Host.read`.

    Returns:
        ``local``, and the shard of all ranks, with whole parameters; twice the same without tensor parallelism.
    """
    parameters = {name: p for named in named_groups for name, p in named.items()}
    cuts = tensor_parallel_cuts({name: parameters[name] for name in local.layout.shapes})
    if not cuts:
        return local, local
    tensor_group = tensor_parallel_group()
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
        UserError: a parameter is cut in a way that is not one run of rows or columns a rank, or a bias is not marked
            that is cut as its weight is.
    """
    cuts: dict[str, int] = {}
    for name, parameter in parameters.items():
        marks: dict[str, Any] = getattr(parameter, AUTOTP, None) or {}
        if _is_in_pieces(marks):
            raise UserError(
                f"tensor parallelism gives each rank several pieces of {name}, as of fused projections; rows or "
                "columns in one piece are needed: use a model with separate projections"
            )
        megatron = None if marks or not is_marked(parameter) else getattr(parameter, "partition_dim", None)
        dim = marks.get("partition_dim", megatron)
        if dim is not None and not marks.get("replicated"):
            cuts[name] = int(dim)
    for name in [name for name, dim in cuts.items() if dim == 0 and name.endswith("weight")]:
        bias = f"{name.removesuffix('weight')}bias"
        if bias in parameters and bias not in cuts and shape_of(parameters[bias]) == shape_of(parameters[name])[:1]:
            raise UserError(
                f"{name} is marked as cut by rows, and {bias}, which has a number for each of these rows, is not: mark "
                "it with tensor_model_parallel = True and partition_dim = 0 as well, or it is taken for a copy"
            )
    return cuts


def _is_in_pieces(mark: Mapping[str, Any]) -> bool:
    """Whether a mark of AutoTP's says that a rank has something else than one run of rows or columns."""
    conversion = mark.get("conversion") or {}
    if conversion.get("unsupported_reason") or mark.get("sub_param_shape") or mark.get("sub_param_shard_widths"):
        return True
    # Layers that cut in one piece say how much each rank has; those that describe a map without it have segments.
    described = conversion.get("affine_map") is not None and not mark.get("replicated")
    return described and not mark.get("partition_sizes")


def whole_frozen(name: str, parameter: Tensor) -> Tensor:
    """A frozen parameter on the CPU, put together from the parts of all tensor-parallel ranks; collective."""
    own, cut = parameter.detach().cpu().clone(), tensor_parallel_cuts({name: parameter})
    return joined(own, cut[name]) if cut else own


def joined(part: Tensor, dim: int) -> Tensor:
    """What the tensor-parallel ranks have parts of, on the CPU; collective over them."""
    return torch.cat(_of_all(part.detach().cpu(), tensor_parallel_group()), dim=dim)


def part_offset(name: str, parameter: Tensor) -> tuple[tuple[int, int], tuple[int, ...]]:
    """Where this rank's part of a parameter begins in the whole, and the whole's shape; collective if it is cut.

    Returns:
        ``((first row, first column), shape)``; of a vector the first element.
    """
    size, cut = list(shape_of(parameter)), tensor_parallel_cuts({name: parameter})
    if not cut:
        return (0, 0), tuple(size)
    dim = cut[name]
    if hasattr(parameter, "megalr_part"):
        _, first, size[dim] = parameter.megalr_part
    else:
        group = tensor_parallel_group()
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


def mark_replaced(layer: nn.Module) -> None:
    """Have AutoTP leave a layer as it is, which it would else take for a dense one because it has a weight."""
    layer.replaced = True  # type: ignore[assignment]


def is_marked(parameter: Tensor) -> bool:
    """Whether a parameter is marked as this rank's part of one that is cut, by Megatron-LM's layers or by us."""
    return bool(getattr(parameter, "tensor_model_parallel", False))


def mark_gradients(parameters: Iterable[Tensor], content: Json) -> None:
    """From now on, mark the gradients of those parameters that are marked as cut, where DeepSpeed looks at these.

    At stage 0 in bf16 and fp16 DeepSpeed takes the norm for clipping of a list of gradients, not of parameters, and
    leaves out on all tensor-parallel ranks but the first what is not marked as cut there: every gradient, if nobody
    marks them. All other stages, and fp32, look at the parameters.

    Args:
        parameters: the model's.
        content: the DeepSpeed JSON.
    """
    half = any((content.get(key) or {}).get("enabled", False) for key in ("bf16", "bfloat16", "fp16"))
    if not half or (content.get("zero_optimization") or {}).get("stage", 0):
        return
    for parameter in parameters:
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_mark_gradient)


def _mark_gradient(parameter: Any) -> None:
    # Asked here, since AutoTP cuts and marks its layers later than the hook is made.
    if parameter.grad is not None and is_marked(parameter):
        parameter.grad.tensor_model_parallel = True


def own_part(parameter: Any, whole: Tensor) -> Tensor:
    """A view of this rank's part of a tensor that is cut as a parameter is; all of it where that is not cut."""
    if not hasattr(parameter, "megalr_part"):
        return whole
    dim, first, _ = parameter.megalr_part
    return whole.narrow(dim, first, shape_of(parameter)[dim])


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
    return torch.cat(_of_all(mine, tensor_parallel_group()))


def ranks_that_share(mpu: Any) -> int:
    """How many ranks share each layer by an ``mpu``, as DeepSpeed asks it; 1 for None."""
    from deepspeed.utils.bwc import bwc_tensor_model_parallel_world_size  # noqa: PLC0415

    return int(bwc_tensor_model_parallel_world_size(mpu))


def check_earlier_groups(ranks: int) -> None:
    """Raise a UserError where an engine before in this process has left groups of another size.

    DeepSpeed keeps the groups that it was told of for the whole process, and the next engine would average gradients
    over them.

    Args:
        ranks: how many are to share each layer now.
    """
    mpu = told_of_parallelism()
    before = ranks if mpu is None else ranks_that_share(mpu)
    if before != ranks:
        raise UserError(
            f"an engine in this process before had {before} tensor-parallel ranks, and this one is to have {ranks}: "
            "DeepSpeed keeps its groups for the whole process and would give this engine those. Start a process for "
            "each of the two"
        )


def tensor_parallel_group(mpu: Any = None) -> dist.ProcessGroup:
    """The ranks that share layers with this one.

    Args:
        mpu: what ``deepspeed.initialize`` takes; None for what it was given.
    """
    from deepspeed.utils.bwc import bwc_tensor_model_parallel_group  # noqa: PLC0415  (slow, and loaded by now)

    group: dist.ProcessGroup = bwc_tensor_model_parallel_group(told_of_parallelism() if mpu is None else mpu)
    return group


def tensor_parallel_rank() -> int:
    """Which of the tensor-parallel ranks that DeepSpeed was told of this one is."""
    return dist.get_rank(tensor_parallel_group())


def _of_all(mine: T, group: dist.ProcessGroup) -> list[T]:
    """Every rank's picklable value, in the group's order; collective."""
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, mine, group=group)
    return values


def _check_groups(tensor: dist.ProcessGroup, data: dist.ProcessGroup | None) -> None:
    """Raise a UserError where tensor- and data-parallel ranks are not all there are, as with pipeline stages."""
    if dist.get_world_size(tensor) * (1 if data is None else dist.get_world_size(data)) != dist.get_world_size():
        raise UserError("tensor parallelism together with pipeline stages is not supported: use one of them")


def _group_of_all() -> dist.ProcessGroup:
    """The group of all tensor- and data-parallel ranks."""
    group = dist.group.WORLD
    assert group is not None
    return group
