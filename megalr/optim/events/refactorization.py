"""Weight refactorization of low-rank pairs: gather each at its owner, decompose there, scatter (arXiv 2505.22922)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from megalr.config.settings import RefactorizationConfig
from megalr.layout.exchange import Exchange, Field, copy_into
from megalr.layout.layout import Layout
from megalr.layout.placement import Unit, assign_owners
from megalr.layout.rounds import Rounds
from megalr.layout.shard import Shard
from megalr.ops.refactorization import REASONS, refactorize_
from megalr.optim.events.base import Event, Moments
from megalr.optim.events.momentum_reset import MomentumReset

logger = logging.getLogger(__name__)


class Refactorization(Event):
    """Balances every pair B, A of the model every T updates; the product stays."""

    name: ClassVar[str] = "refactorization"

    def __init__(
        self, config: RefactorizationConfig, pairs: Sequence[tuple[str, str]], reset: MomentumReset | None
    ) -> None:
        """
        Args:
            config: the "refactorization" section.
            pairs: qualified names of the factors, as (B, A).
            reset: what may make the moments zero at the same update, so that none have to be carried over.
        """
        self._config, self._pairs, self._reset = config, list(pairs), reset

    def attach(self, shard: Shard, exchange: Exchange, moments: Moments) -> None:
        super().attach(shard, exchange, moments)
        self._units = pair_units(self._pairs, shard.layout)
        self._buffers = sorted({f.buffer for pair in self._pairs for n in pair for f in shard.layout.of(n)})

    def due(self, updates: int) -> bool:
        return updates % self._config.interval == 0

    def resets_due(self, updates: int) -> set[str]:
        return {"factors"} if self._config.moments == "reset" and self.due(updates) else set()

    def end_update(self, updates: int) -> list[int]:
        if not self.due(updates):
            return []
        zeroed = self._reset is not None and "factors" in self._reset.resets_due(updates)
        fields: list[Field] = [self._shard.buffers]
        if self._config.moments == "transport" and not zeroed:
            fields += [self._moments("exp_avg"), self._moments("exp_avg_sq")]
        refactorize_pairs(self._units, self._exchange, fields)
        return self._buffers

    def routes(self) -> dict[str, tuple[int | None, int | None]]:
        return {name: (None, unit.owner) for unit in self._units for name in unit.names}


def pair_units(pairs: Sequence[tuple[str, str]], layout: Layout) -> list[Unit]:
    """The (B, A) pairs and their owners; a pair costs its leading operations, (m + n) r²."""
    costs: dict[tuple[str, ...], float] = {}
    for b, a in pairs:
        (m, r), (_, n) = layout.shapes[b], layout.shapes[a]
        costs[b, a] = float((m + n) * r * r)
    return assign_owners(costs, layout)


def refactorize_pairs(units: Sequence[Unit], exchange: Exchange, fields: Sequence[Field]) -> list[str]:
    """Balance every pair, in place in all ranks' masters. Collective.

    Singular vectors are not reproducible across machines, so exactly one rank computes them and the others receive.

    Args:
        units: what to refactorize, and where; see :func:`pair_units`.
        exchange: over the group that shares the masters.
        fields: this rank's flat buffers: the masters, alone or followed by first and second moments in the same
            layout, which are then carried into the new factors.

    Returns:
        Names of the layers owned here that were left as they are; the log says why.
    """
    untouched: dict[int, list[str]] = {}

    def balance(own: Sequence[Unit], whole: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
        # Of each factor the master comes first, then its moments.
        status = refactorize_(
            [whole[b][0] for b, _ in _names(own)],
            [whole[a][0] for _, a in _names(own)],
            [moment for names in _names(own) for name in names for moment in whole[name][1:]],
            "transport" if len(fields) > 1 else "keep",
        )
        for (b, _), code in zip(_names(own), status.tolist(), strict=True):
            if code:
                untouched.setdefault(code, []).append(b.removesuffix(".B"))
        for tensors in whole.values():
            for tensor in tensors:
                exchange.broadcast_replicas(tensor)
        return whole

    Rounds(exchange, units, fields).run(balance, [copy_into(field) for field in fields])
    for code, names in sorted(untouched.items()):
        logger.warning("refactorization left %s as they are: %s", ", ".join(names), REASONS[code])
    return [name for names in untouched.values() for name in names]


def _names(units: Sequence[Unit]) -> list[tuple[str, str]]:
    return [(unit.names[0], unit.names[1]) for unit in units]
