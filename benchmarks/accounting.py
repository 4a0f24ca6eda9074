"""Bytes that a rank sends, counted where every collective of torch passes: at the dispatcher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

KINDS = {
    "allgather_": "all_gather",
    "_allgather_base_": "all_gather",
    "allgather_coalesced_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "reduce_scatter_": "reduce_scatter",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "broadcast_": "broadcast",
    "reduce_": "reduce",
    "gather_": "gather",
    "scatter_": "scatter",
    "alltoall_": "all_to_all",
    "alltoall_base_": "all_to_all",
    "send": "send",
}
SILENT = ("recv_", "recv_any_source_", "barrier", "monitored_barrier_")


def sent_bytes(kind: str, message: float, world_size: int, *, is_root: bool = False) -> float:
    """Bytes that one rank sends in a collective, by the usual algorithms that keep every link equally busy.

    ======================  ==============================  ==============================================
    collective              ``message``                     sent, for P ranks
    ======================  ==============================  ==============================================
    all_gather              this rank's shard               message (P-1): a ring passes every shard on
    reduce_scatter          this rank's whole input         message (P-1)/P: the same ring, backwards
    all_reduce              this rank's tensor              2 message (P-1)/P: both of them
    broadcast               the tensor                      message (P-1) by the root, 0 by others
    scatter                 one rank's piece                message (P-1) by the root, 0 by others
    reduce, gather          this rank's tensor              message, 0 by the root
    all_to_all, send        what is for other ranks         message
    ======================  ==============================  ==============================================

    Args:
        kind: of the table.
        message: bytes.
        world_size: P, of the group.
        is_root: whether this rank is the root, of those that have one.
    """
    others = world_size - 1
    match kind:
        case "all_gather":
            return message * others
        case "reduce_scatter":
            return message * others / world_size
        case "all_reduce":
            return 2 * message * others / world_size
        case "broadcast" | "scatter":
            return message * others if is_root else 0
        case "reduce" | "gather":
            return 0 if is_root else message
        case "all_to_all" | "send":
            return message
    raise ValueError(f"there is no accounting for the collective {kind!r}")


class SentBytes(TorchDispatchMode):
    """Counts while it is entered, in this process, whoever calls: DeepSpeed, megalr or anyone else.

    Attributes:
        total: bytes sent so far.
        by_kind: the same, by collective.
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_kind: dict[str, float] = {}

    @property
    def total(self) -> float:
        return sum(self.by_kind.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._count(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def _count(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        name = func._schema.name.partition("::")[2]
        if name in SILENT:
            return
        if name not in KINDS:
            raise NotImplementedError(f"the collective c10d::{name} is not in benchmarks.accounting.KINDS")
        given = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | kwargs
        group: Any = dist.ProcessGroup.unbox(given["process_group"])
        kind = KINDS[name]
        sent = sent_bytes(
            kind,
            _message(name, given, group.rank(), group.size()),
            group.size(),
            is_root=given.get("root_rank") == group.rank(),
        )
        self.by_kind[kind] = self.by_kind.get(kind, 0) + sent


def _message(name: str, given: dict[str, Any], rank: int, world_size: int) -> float:
    """What :func:`sent_bytes` calls the message, from the operator's arguments."""
    if name == "alltoall_base_":
        tensor, splits = given["input"], given["input_split_sizes"]
        if not splits:
            return _bytes(tensor) * (world_size - 1) / world_size
        return _bytes(tensor) * (1 - splits[rank] / sum(splits)) if sum(splits) else 0
    if name == "alltoall_":
        return _bytes([tensor for k, tensor in enumerate(given["input_tensors"]) if k != rank])
    if name == "scatter_":
        return _bytes(given["output_tensors"])
    for key in ("input_tensor", "input_tensors", "input_list", "inputs", "tensors"):
        if key in given:
            return _bytes(given[key])
    raise NotImplementedError(f"c10d::{name} has none of the arguments that are known")


def _bytes(tensors: Any) -> int:
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(map(_bytes, tensors))
