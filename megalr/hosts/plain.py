"""An ordinary torch job without an engine: whole tensors on every rank, trained in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from megalr.hosts.base import Host, NamedGroup
from megalr.layout.layout import Fragment, Layout
from megalr.layout.shard import Shard, Twin


class Plain(Host):
    """A job whose ranks, if there are several, all hold the same, as under DistributedDataParallel."""

    def read(self, named_groups: Sequence[NamedGroup], param_groups: Sequence[dict[str, Any]]) -> tuple[Shard, Shard]:
        group = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
        shard = read_whole(named_groups, param_groups, group)
        return shard, shard

    def recognizes(self, parameter: Tensor) -> bool:
        return True


def read_whole(
    named_groups: Sequence[NamedGroup], param_groups: Sequence[dict[str, Any]], group: dist.ProcessGroup | None
) -> Shard:
    """The layout of parameters that every rank has whole.

    Args:
        named_groups, param_groups: see :meth:`~megalr.hosts.base.Host.read`; "params" may be the parameters, or one
            master for each trainable parameter, in order.
        group: the ranks that have the same; None for a single process.

    Raises:
        RuntimeError: a master has another shape than its parameter.
    """
    world_size = dist.get_world_size(group) if group is not None else 1
    rank = dist.get_rank(group) if group is not None else 0
    shapes: dict[str, tuple[int, ...]] = {}
    fragments: list[Fragment] = []
    buffers: list[Tensor] = []
    weights: list[Tensor] = []
    names: list[str] = []
    for named, param_group in zip(named_groups, param_groups, strict=True):
        # An engine makes no master of a parameter without elements.
        trainable = {name: p for name, p in named.items() if p.requires_grad and p.numel()}
        tensors = [t for t in param_group["params"] if t.requires_grad and t.numel()]
        for (name, parameter), tensor in zip(trainable.items(), tensors, strict=True):
            if parameter.shape != tensor.shape:
                raise RuntimeError(
                    f"expected the master of {name} {tuple(parameter.shape)}, found {tuple(tensor.shape)}"
                )
            names.append(name)
            shapes[name] = tuple(parameter.shape)
            fragments += [Fragment(name, 0, parameter.numel(), r, len(buffers), 0, copy=r) for r in range(world_size)]
            buffers.append(tensor)
            weights.append(parameter)
    layout = Layout(world_size, shapes, fragments)
    flat = [b.data.view(-1) for b in buffers]

    def publish(buffer: int) -> None:
        if weights[buffer] is not buffers[buffer]:
            weights[buffer].data.copy_(buffers[buffer].data)

    def twins() -> list[Twin]:
        flat = [(name, w.data.view(-1), b.data.view(-1)) for name, w, b in zip(names, weights, buffers, strict=True)]
        return [Twin(*each) for each, w, b in zip(flat, weights, buffers, strict=True) if w is not b]

    # Nobody else looks at gradients; the optimizer sees all of them in its groups.
    return Shard(layout, flat, buffers, rank, group, publish, unseen_gradients=list, replicated=True, twins=twins)
