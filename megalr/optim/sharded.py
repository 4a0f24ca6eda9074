"""What the optimizer works with once an engine has cut the parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megalr import hosts
from megalr.config.settings import MegalrConfig
from megalr.errors import UserError
from megalr.hosts.base import Host
from megalr.layout.exchange import Exchange
from megalr.layout.shard import Shard
from megalr.optim.groups import ParameterGroup
from megalr.optim.matrices import MatrixUpdater
from megalr.timing import Stopwatch


@dataclass(frozen=True)
class Sharded:
    """This rank's side of the parameters, and what works on whole ones.

    Attributes:
        shard: the masters, and what lies where.
        exchange: over all masters' ranks.
        matrices: what runs the rule; None without one.
        updates_parts: whether tensor-parallel ranks run the rule each on what it has.
    """

    shard: Shard
    exchange: Exchange
    matrices: MatrixUpdater | None
    updates_parts: bool

    @classmethod
    def read(
        cls,
        groups: Sequence[ParameterGroup],
        param_groups: Sequence[dict[str, Any]],
        config: MegalrConfig,
        host: Host | None,
    ) -> Sharded:
        """Read what lies where, and choose owners; collective where tensor parallelism cuts parameters.

        Args:
            groups: as they were given to the optimizer.
            param_groups: its groups now, with the engine's tensors in "params".
            config: maximum temporary memory, random seed, and how tensor-parallel ranks update.
            host: the engine; None: recognized by what it has made of the parameters.

        Raises:
            UserError: what is to be updated has a dtype that cannot be.
        """
        read = hosts.read if host is None else host.read
        local, shard = read([group.parameters for group in groups], param_groups)
        device, bucket_bytes = shard.message_device(), config.exchange_bucket_bytes
        exchange = Exchange(
            shard.layout,
            shard.rank,
            shard.group,
            device=device,
            replicas=shard.replicas,
            bucket_bytes=bucket_bytes,
        )
        exact = config.tp_update == "exact"
        rules = {n: g.rule for g in groups if g.rule for n in g.parameters if n in shard.layout.shapes}
        _check_dtypes(shard, with_rule=bool(rules))
        matrices = None
        if rules:
            own = shard if exact else local
            matrices = MatrixUpdater(rules, own, device=device, bucket_bytes=bucket_bytes, seed=config.seed)
        return cls(shard, exchange, matrices, updates_parts=not exact and local is not shard)

    @property
    def bytes_moved(self) -> int:
        """Bytes that all ranks together have sent each other for whole-matrix work."""
        return self.exchange.bytes_moved + (0 if self.matrices is None else self.matrices.exchange.bytes_moved)

    def measure_exchange(self, stopwatch: Stopwatch | None) -> None:
        """Have a stopwatch measure, as "exchange", how long this rank waits for whole-matrix work's messages."""
        for exchange in (self.exchange, *([] if self.matrices is None else [self.matrices.exchange])):
            exchange.stopwatch = stopwatch

    def flat_gradients(self, here: Mapping[int, Tensor]) -> list[Tensor]:
        """The gradients of some buffers, flat, in the buffers' layout; nothing of the others.

        Args:
            here: what the engine hands to ``step()``, by buffer.
        """
        gradients = [buffer[:0] for buffer in self.shard.buffers]
        for buffer, parameter in here.items():
            gradients[buffer] = gradient_of(parameter).reshape(-1)
        return gradients


def gradient_of(parameter: Tensor) -> Tensor:
    """The gradient; without one it counts as zero, as ZeRO has it."""
    return parameter.new_zeros(parameter.shape) if parameter.grad is None else parameter.grad


def _check_dtypes(shard: Shard, *, with_rule: bool) -> None:
    """Refuse what torch would refuse in mid-update: AdamW takes bf16 without masters, rules need fp32."""
    fitting = {torch.float32} if with_rule else {torch.float32, torch.bfloat16}
    found = sorted(
        {str(buffer.dtype).removeprefix("torch.") for buffer in shard.buffers if buffer.dtype not in fitting}
    )
    if found:
        raise UserError(
            f"the optimizer was given {found[0]} weights to update, and needs fp32: for a model in 16 bits write "
            '"bf16": {"enabled": true} in the JSON, which keeps fp32 masters; for any other call model.float() before '
            "the optimizer is built"
        )
