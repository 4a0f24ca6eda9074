"""Weights that somebody has written become those that an engine trains on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalr import hosts
from megalr.agreement import has_ranks
from megalr.errors import UserError, some_of
from megalr.generation import next_generation
from megalr.guards.replicas import compare_replicas, find_replicas, in_words
from megalr.hosts import host_of
from megalr.hosts.base import RunningHost
from megalr.hosts.tensor_parallel import indices_in_whole, part_offset
from megalr.layers.base import FactorizedLinear
from megalr.layout.exchange import write
from megalr.layout.shard import Shard
from megalr.naming import named_buffers, named_parameters, submodule
from megalr.optim.optimizer import MegalrOptimizer

SHOWN = 3  # names in a message


@torch.no_grad()
def adopt_weights(engine: Any, weights: Mapping[str, Tensor] | None = None, *, masters: bool = False) -> None:
    """Continue training from weights that were written after the engine was made, for example loaded or averaged.

    An engine keeps fp32 masters and overwrites the weights of the model with them. Weights that were only written into
    the model are therefore refused at the next update. Moments, bases and counts stay. Collective; call it between two
    updates.

    For layers with factors write B and A; for projected layers write W0 ("weight"), R and the basis. Each is adopted
    as it was written. To give a projected layer a dense weight, write it as W0, and zeros as R. The remainder that
    ``"merge_rounding": "remainder"`` keeps of an adopted W0 is dropped.

    Args:
        engine: of ``megalr.initialize``, or DeepSpeed's with ``megalr.build_optimizer``.
        weights: whole tensors by qualified name, as from :func:`megalr.consolidated_state_dict`. Only rank 0's are
            used. They may be fp32, and may be some of the model's. None: adopt what was written into the model itself,
            the same on all ranks; elements that were not written keep their fp32 master. At ZeRO stage 3, write inside
            of ``deepspeed.zero.GatheredParameters(..., modifier_rank=0)``.
        masters: the opposite direction: the model takes what was written into the masters, as
            ``deepspeed.utils.safe_set_full_fp32_param`` does.

    Raises:
        UserError: an update has begun; ranks hold different weights; the tensors do not fit the model; the engine is a
            pipeline's; nothing was changed.
    """
    host = host_of(engine)
    optimizer = _optimizer_of(host)
    shard = optimizer.prepare()
    optimizer.check_model(weights=False)
    given = _names_on_first(weights)
    if given is not None:
        # The optimizer knows one of the names of a parameter that has several.
        first = {id(parameter): name for name, parameter in named_parameters(host.module)}
        _check_names(host.module, shard, given, first)
        host.prepare_load()
        for name, shape in given.items():
            _take(host.module, shard, first, name, _from_first(weights, name, shape, host.device))
            optimizer.remainders.pop(name.removesuffix(".weight"), None)
    elif masters:
        host.prepare_load()
    else:
        _check_replicas(host)
        _take_written(host, shard)
        optimizer.remainders.clear()
        host.prepare_load()
    host.publish(shard)
    next_generation()


def _optimizer_of(host: RunningHost) -> MegalrOptimizer:
    if not isinstance(host.optimizer, MegalrOptimizer):
        raise UserError(
            f"the engine's optimizer is {type(host.optimizer).__name__}: megalr.adopt_weights is for engines of "
            "megalr.initialize, or with what megalr.build_optimizer returns"
        )
    if host.has_stages:
        raise UserError(
            "megalr.adopt_weights does not know pipeline engines: write weights before deepspeed.initialize, or load "
            "them with engine.load_checkpoint"
        )
    made, size = host.progress()
    if made:
        raise UserError(
            f"an update has begun: {made} of its {size} micro-batches are made. Call megalr.adopt_weights between two "
            "updates"
        )
    return host.optimizer


def _names_on_first(weights: Mapping[str, Tensor] | None) -> dict[str, tuple[int, ...]] | None:
    """Names and shapes of what rank 0 was given, on all ranks; None for nothing."""
    names = [None if weights is None else {name: tuple(each.shape) for name, each in weights.items()}]
    if has_ranks():
        dist.broadcast_object_list(names, src=0)
    return names[0]


def _from_first(
    weights: Mapping[str, Tensor] | None, name: str, shape: tuple[int, ...], device: torch.device
) -> Tensor:
    """One of rank 0's tensors, in fp32, on all ranks."""
    whole = torch.empty(shape, device=device)
    if weights is not None and name in weights and weights[name].shape == shape:
        whole.copy_(weights[name])
    if has_ranks():
        dist.broadcast(whole, src=0)
    return whole


def _check_names(
    module: nn.Module, shard: Shard, given: Mapping[str, tuple[int, ...]], first: Mapping[int, str]
) -> None:
    """Refuse tensors that the model does not have in this shape."""
    known = {name: tuple(buffer.shape) for name, buffer in named_buffers(module)}
    for name, parameter in named_parameters(module, remove_duplicate=False):
        known[name] = tuple(shard.layout.shapes.get(first[id(parameter)]) or part_offset(name, parameter)[1])
        if name in given and indices_in_whole(parameter) is not None:
            raise UserError(
                f"{name}: tensor-parallel ranks have chosen their values of it and cannot take others: write them into "
                "the model before megalr.initialize"
            )
    wrong = [name for name, shape in given.items() if known.get(name) != tuple(shape)]
    if wrong:
        lines = [f"{name}: {given[name]} -> {known.get(name, 'none')}" for name in wrong]
        raise UserError(
            "these weights are not of this model (given -> the model's):\n  "
            + some_of(lines, SHOWN, "\n  ")
            + "\nGive tensors by the names and in the shapes of megalr.consolidated_state_dict(engine)"
        )


def _take(module: nn.Module, shard: Shard, first: Mapping[int, str], name: str, whole: Tensor) -> None:
    """Write a whole tensor where this rank holds parts of it: into the masters, or a weight or buffer without any."""
    owner, _, leaf = name.rpartition(".")
    layer = submodule(module, owner)
    parameter = layer._parameters.get(leaf)
    if parameter is None:
        layer.get_buffer(leaf).copy_(whole)
        if isinstance(layer, FactorizedLinear):
            layer.buffers_changed()
        return
    held = first[id(parameter)]
    if held in shard.layout.shapes:
        write(shard.layout.flat(held, whole), shard.buffers, shard.layout.on(held, shard.rank))
        return
    origin, _ = part_offset(name, parameter)
    for dim, (start, length) in enumerate(zip(origin, hosts.logical_shape(parameter), strict=False)):
        whole = whole.narrow(dim, start, length)
    hosts.write(parameter, whole)


def _take_written(host: RunningHost, shard: Shard) -> None:
    """Take over, element by element, the weights that are not their masters in the model's dtype."""
    twins = shard.twins()
    # All are compared before any is written: of what stage 3 has gathered there are two weights to a master.
    changed = [twin.weight != twin.master.to(twin.weight) for twin in twins]
    for twin, mask in zip(twins, changed, strict=True):
        here = mask.to(twin.master.device)
        twin.master[here] = twin.weight[mask].to(twin.master)
    for parameter in host.module.parameters():
        (_, chunk), *whole = hosts.held(parameter)
        if not parameter.requires_grad and whole and hosts.is_partitioned(parameter) and chunk.dtype == parameter.dtype:
            hosts.write(parameter, whole[-1][1])


def _check_replicas(host: RunningHost) -> None:
    """Refuse weights that were written on some ranks only."""
    parameters = {name for name, _ in named_parameters(host.module)}
    replicas = [replica for replica in find_replicas(host.module, {}) if replica.name in parameters]
    found = compare_replicas(replicas, host.device) if replicas else {}
    if found:
        raise UserError(
            "ranks do not hold the same weights; compared with the majority, or with rank 0 where there is none, "
            f"these differ:\n{in_words(found, len(replicas))}\nWrite the same on every rank, or give whole tensors on "
            "rank 0 as megalr.adopt_weights(engine, weights)"
        )
