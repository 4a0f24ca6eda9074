"""Comparing what ranks should hold alike, bit for bit, by hashes of it.

A hash is two sums over a tensor's bit patterns as integers, one plain and one weighted by position, both modulo 2^64:
they depend on no order of summation, so that the same bits have the same hash on every device, and one flipped bit
always changes the first.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalr.errors import some_of
from megalr.hosts import is_replicated
from megalr.hosts.tensor_parallel import tensor_parallel_cuts, tensor_parallel_rank
from megalr.naming import named_parameters

CHUNK = 1 << 20  # elements that are integers at a time
SHOWN = 5  # names in a message
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}


@dataclass(frozen=True)
class Replica:
    """One thing that several ranks hold.

    Attributes:
        name: what it is.
        value: this rank's.
        everywhere: all ranks hold the same; otherwise those that are the same tensor-parallel rank do.
    """

    name: str
    value: Tensor
    everywhere: bool = True


def find_replicas(module: nn.Module, counts: dict[str, Any]) -> list[Replica]:
    """What this rank holds of a model that other ranks hold as well, and the counts.

    A parameter that the engine cuts is among it while it is gathered, an expert, of which ranks have different ones,
    never.

    Args:
        module: the model, as the engine has it.
        counts: JSON that should be the same on all ranks.
    """
    parameters = dict(named_parameters(module))
    cuts = tensor_parallel_cuts(parameters)
    found = []
    for name, parameter in parameters.items():
        if is_replicated(parameter):
            found.append(Replica(name, parameter.detach(), everywhere=name not in cuts))
    persistent = module.state_dict(keep_vars=True)
    buffers = {name: buffer for name, buffer in module.named_buffers() if name in persistent}
    # What a cut layer has beside its parameters may be of its part; without cuts there is one tensor-parallel rank.
    found += [Replica(name, buffer.detach(), everywhere=not cuts) for name, buffer in buffers.items()]
    words = torch.tensor(list(json.dumps(counts, sort_keys=True).encode()), dtype=torch.uint8)
    return [*found, Replica("the counts of updates", words)]


def compare_replicas(replicas: Sequence[Replica], device: torch.device) -> dict[int, list[str]]:
    """Names of what a rank holds otherwise than the majority does, or than the first rank where there is none.

    Collective, one gather; every rank gets the same answer.

    Args:
        replicas: the same names on all ranks, in the same order.
        device: where messages have to lie.
    """
    own = torch.stack([hash_of(replica.value).to(device) for replica in replicas])
    tensor_rank = 0 if all(replica.everywhere for replica in replicas) else tensor_parallel_rank()
    own = torch.cat([own, own.new_full((1, 3), tensor_rank)])
    rows = [own]
    if dist.is_initialized() and dist.get_world_size() > 1:
        rows = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, own)
    gathered = torch.stack(rows).cpu()
    tensor_ranks = gathered[:, -1, 0].tolist()
    return differing(replicas, gathered[:, :-1], tensor_ranks)


def differing(replicas: Sequence[Replica], hashes: Tensor, tensor_ranks: Sequence[int]) -> dict[int, list[str]]:
    """See :func:`compare_replicas`.

    Args:
        replicas: names, and who holds the same.
        hashes: int64 (ranks, replicas, 3).
        tensor_ranks: which tensor-parallel rank each rank is.
    """
    everyone = list(range(len(tensor_ranks)))
    alike = [[rank for rank in everyone if tensor_ranks[rank] == each] for each in sorted(set(tensor_ranks))]
    found: dict[int, list[str]] = {}
    for i, replica in enumerate(replicas):
        for group in [everyone] if replica.everywhere else alike:
            values = [tuple(value) for value in hashes[group, i].tolist()]
            value, votes = Counter(values).most_common(1)[0]
            expected = value if 2 * votes > len(group) else values[0]
            for rank, seen in zip(group, values, strict=True):
                if seen != expected:
                    found.setdefault(rank, []).append(replica.name)
    return dict(sorted(found.items()))


def hash_of(tensor: Tensor) -> Tensor:
    """int64 (3,), where the tensor lies: how many elements, the plain and the weighted sum of their bits."""
    flat = tensor.reshape(-1)
    if flat.numel() == 0:
        return torch.zeros(3, dtype=torch.int64, device=flat.device)
    bits = flat.view(_INTEGERS[flat.element_size()])
    plain = torch.zeros((), dtype=torch.int64, device=bits.device)
    weighted = torch.zeros_like(plain)
    for start in range(0, bits.numel(), CHUNK):
        part = bits[start : start + CHUNK].long()
        plain += part.sum()
        weighted += (part * torch.arange(start + 1, start + 1 + part.numel(), device=bits.device)).sum()
    return torch.stack([torch.full_like(plain, flat.numel()), plain, weighted])


def in_words(found: dict[int, list[str]], total: int) -> str:
    """What :func:`compare_replicas` found, for a message."""
    lines = []
    for rank, names in found.items():
        lines.append(f"  rank {rank}: {some_of(names, SHOWN)} ({len(names)} of {total})")
    return "\n".join(lines)
