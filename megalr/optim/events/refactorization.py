"""Weight refactorization of low-rank pairs: gather each at its owner, decompose there, scatter (arXiv 2505.22922)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import chain
from typing import ClassVar

import torch
from torch import Tensor, nn

from megalr.agreement import is_first
from megalr.config.settings import MegalrConfig, RefactorizationConfig
from megalr.errors import UserError, some_of
from megalr.layers.replacement import factor_pairs, half_frozen, replaced_layers
from megalr.layout.exchange import Exchange, Field, copy_into
from megalr.layout.layout import Layout
from megalr.layout.placement import Unit, assign_owners
from megalr.layout.rounds import Rounds
from megalr.layout.shard import Shard
from megalr.ops.refactorization import REASONS, refactorize_
from megalr.optim.events.base import Event, Moments
from megalr.optim.events.momentum_reset import MomentumReset
from megalr.optim.matrices import MatrixUpdater

logger = logging.getLogger(__name__)

# By factor, (r, r): what maps gradients of the old one to those of the new, B's from the right and A's from the left.
Turns = dict[str, Tensor]


class Refactorization(Event):
    """Balances every pair B, A of the model every T updates; the product stays.

    Attributes:
        matrices: what keeps the factors' states, to be set before :meth:`attach`; None: they are AdamW's.
    """

    name: ClassVar[str] = "refactorization"

    def __init__(
        self,
        config: RefactorizationConfig,
        pairs: Sequence[tuple[str, str]],
        reset: MomentumReset | None,
    ) -> None:
        """
        Args:
            config: the "refactorization" section.
            pairs: qualified names of the factors, as (B, A).
            reset: what may make the moments zero at the same update, so that none have to be carried over.
        """
        self._config, self._pairs, self._reset = config, list(pairs), reset
        self.matrices: MatrixUpdater | None = None

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
        carries, by_rule = self._config.moments == "transport" and not zeroed, self.matrices
        fields: list[Field] = [self._shard.buffers]
        if carries and by_rule is None:
            fields += [self._moments("exp_avg"), self._moments("exp_avg_sq")]
        turns: Turns | None = {} if carries and by_rule is not None else None
        refactorize_pairs(self._units, self._exchange, fields, turns)
        if turns is not None and by_rule is not None:
            self._carry(turns, by_rule)
        return self._buffers

    def _carry(self, turns: Turns, by_rule: MatrixUpdater) -> None:
        """Send every pair's maps to whoever keeps the factors' states."""
        for unit in self._units:
            rank = self._shard.layout.shapes[unit.names[0]][1]
            for name, left in zip(unit.names, (False, True), strict=True):
                turn = turns.get(name)
                if turn is None:
                    turn = torch.empty(rank, rank, device=self._shard.buffers[0].device)
                self._exchange.broadcast(turn, unit.owner)
                by_rule.carry(name, turn, left=left)

    def routes(self) -> dict[str, tuple[int | None, int | None]]:
        return {name: (None, unit.owner) for unit in self._units for name in unit.names}


def refactorized_pairs(model: nn.Module, config: MegalrConfig) -> list[tuple[str, str]]:
    """The pairs of a model that refactorizations balance, as (B, A): those of which both are trained.

    A pair with a frozen factor has no other with the same product and that factor, unless its rank is lower. It is
    left as it is, and the log says so.

    Args:
        model: with its replaced layers.
        config: with or without a "refactorization" section.

    Raises:
        UserError: there is such a section, and of every layer that is trained one factor is frozen.
    """
    pairs = list(factor_pairs(model))
    halves = half_frozen(replaced_layers(model)) if config.refactorization else {}
    if not halves:
        return pairs
    some = some_of([f"{name}.{frozen}" for name, (frozen, _) in halves.items()])
    if not pairs:
        raise UserError(
            f"megalr.refactorization rewrites both factors of a layer, and one factor of each trained layer is frozen "
            f"(requires_grad is False): {some}. Remove megalr.refactorization, or train both factors"
        )
    if is_first():
        logger.warning("refactorization leaves layers of which one factor is frozen as they are: %s", some)
    return pairs


def pair_units(pairs: Sequence[tuple[str, str]], layout: Layout) -> list[Unit]:
    """The (B, A) pairs and their owners; a pair costs its leading operations, (m + n) r²."""
    costs: dict[tuple[str, ...], float] = {}
    for b, a in pairs:
        (m, r), (_, n) = layout.shapes[b], layout.shapes[a]
        costs[b, a] = float((m + n) * r * r)
    return assign_owners(costs, layout)


def refactorize_pairs(
    units: Sequence[Unit], exchange: Exchange, fields: Sequence[Field], turns: Turns | None = None
) -> list[str]:
    """Balance every pair, in place in all ranks' masters. Collective.

    Singular vectors are not reproducible across machines, so exactly one rank computes them and the others receive.

    Args:
        units: what to refactorize, and where; see :func:`pair_units`.
        exchange: over the group that shares the masters.
        fields: this rank's flat buffers: the masters, alone or followed by first and second moments in the same
            layout, which are then carried into the new factors.
        turns: takes the maps of the pairs that are owned here, for who carries states himself; the identity where a
            pair is left as it is. Not together with moments.

    Returns:
        Names of the layers owned here that were left as they are; the log says why.
    """
    untouched: dict[int, list[str]] = {}

    def balance(own: Sequence[Unit], whole: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
        names = _names(own)
        if turns is None:
            # Of each factor the master comes first, then its moments.
            moments = [moment for pair in names for name in pair for moment in whole[name][1:]]
            factors = [whole[b][0] for b, _ in names], [whole[a][0] for _, a in names]
            status = refactorize_(*factors, moments, "transport" if moments else "keep").tolist()
        else:
            status = [_refactorize_with_maps(b, a, whole, turns) for b, a in names]
        for (b, _), code in zip(names, status, strict=True):
            if code:
                untouched.setdefault(code, []).append(b.removesuffix(".B"))
        maps = [] if turns is None else [turns[name] for pair in names for name in pair]
        for tensor in [*chain.from_iterable(whole.values()), *maps]:
            exchange.broadcast_replicas(tensor)
        return whole

    Rounds(exchange, units, fields).run(balance, [copy_into(field) for field in fields])
    for code, names in sorted(untouched.items()):
        logger.warning("refactorization left %s as they are: %s", ", ".join(names), REASONS[code])
    return [name for names in untouched.values() for name in names]


def _refactorize_with_maps(b: str, a: str, whole: dict[str, list[Tensor]], turns: Turns) -> int:
    """Balance one pair in place; its status. The maps are what becomes of first moments that are the identity."""
    (factor_b,), (factor_a,) = whole[b], whole[a]
    rank = factor_a.shape[0]
    first_b, first_a = (torch.eye(*factor.shape, device=factor.device) for factor in (factor_b, factor_a))
    moments = [first_b, torch.zeros_like(first_b), first_a, torch.zeros_like(first_a)]
    status = refactorize_([factor_b], [factor_a], moments, "transport")
    turns[b], turns[a] = first_b[:rank].clone(), first_a[:, :rank].clone()
    return int(status.item())


def _names(units: Sequence[Unit]) -> list[tuple[str, str]]:
    return [(unit.names[0], unit.names[1]) for unit in units]
