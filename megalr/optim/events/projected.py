"""Refreshes of projected layers' bases from full gradients, with W0 taking over what R has learned; and AdamW on R.

A refresh at update t gives what GaLore's gives, and no other update has the gradient of a whole matrix:

1. During update t the layer's backward passes add up the gradient G of the whole weight beside that of R.
2. G, or its products with thin matrices alone where the projector needs no more, is summed over the ranks.
3. One rank computes the basis, all receive it, and W0 takes R Qᵀ.
4. R starts again at zero; its moments are kept, reset or transported; its gradient becomes G Q with the new Q.

What the engine delivers as R's gradient is s G Q with the *old* Q, where s stands for averaging, loss scale and
clipping. Both are known here, so s is measured instead of computed from settings; and where the two are not parallel,
as after an update that the engine has skipped, G is not this update's and the refresh waits for the next.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from megalr.hosts import held, logical_shape
from megalr.hosts import write as write_frozen
from megalr.hosts.tensor_parallel import in_whole, own_part
from megalr.layers.base import Parametrization
from megalr.layers.projected import ProjectedConfig, ProjectedLinear
from megalr.layout.exchange import Exchange, Field, run_of, write
from megalr.layout.layout import Fragment
from megalr.layout.shard import Shard
from megalr.ops import low_rank_adam, momentum_reset
from megalr.optim.events.base import LayerEvents, Moments, Step
from megalr.optim.events.bases import Basis, BasisSchedule, bases_of
from megalr.optim.events.refresh import SKETCHING, FullGradient, Refresh, project, refresh
from megalr.optim.frozen_weights import FrozenWeights
from megalr.rules.adam_moments import rotate_moments
from megalr.rules.base import State, tensor
from megalr.rules.bases import Side
from megalr.seeding import generator
from megalr.timing import span

logger = logging.getLogger(__name__)

PARALLEL = 0.98  # the least squared cosine between the two gradients of R; rounding to bf16 leaves more than 0.999
# Updates that a refresh waits for a full gradient to agree with R's. One that was skipped explains a single time; after
# more, something changes R's gradient on its way, and the refresh does without its exact counterpart in the new basis.
PATIENCE = 3
WAITING = {
    True: "R's gradient is not the full gradient times the basis: an update was skipped, a hook, a penalty or "
    "clipping by value changes it, or it comes from torch.autograd.grad in place of backward()",
    False: "the full gradient is not finite",
}


@dataclass(frozen=True)
class Renewed:
    """R's gradient of this update after a refresh, until R's buffer is stepped.

    Attributes:
        exact: in the new basis, from the full gradient; None where that does not agree with what was delivered.
        turn: what takes the delivered one there otherwise, (r, r).
    """

    exact: Tensor | None
    turn: Tensor


class Projections(LayerEvents):
    """The bases of a model's projected layers, and AdamW on their R.

    Attributes:
        schedule: the bases, and whose turn it is.
    """

    parametrization: ClassVar[type[Parametrization]] = ProjectedConfig
    group: ClassVar[str] = "projected"

    def __init__(self, layers: Mapping[str, Any], config: ProjectedConfig, seed: int) -> None:
        """
        Args:
            layers: the model's, by qualified name; those whose R is not trained are left alone.
            config: the "parametrization" section.
            seed: random seed of bases.
        """
        self.schedule = BasisSchedule(bases_of(layers), config)
        self.remainders: dict[str, Tensor] = {}
        self._config, self._seed = config, seed
        self._renewed: dict[str, Renewed] = {}  # by layer
        self._kept = 1.0  # what the last update's weight decay left of a weight

    def attach(self, shard: Shard, exchange: Exchange, moments: Moments) -> None:
        super().attach(shard, exchange, moments)
        for index, basis in enumerate(self.schedule.bases):
            basis.owner = index % shard.layout.world_size
        self.frozen_weights = FrozenWeights(
            self._config.merge_rounding, shard, exchange, self._seed, self.remainders, "R"
        )

    def update(self, which: Sequence[int], gradients: Field, step: Step) -> None:
        """Refresh the bases that are due, then AdamW on all R that lie in some of the flat buffers; collective."""
        here = [basis for basis in self.schedule.bases if any(self._buffer(name) in which for name in basis.layers)]
        due = [basis for basis in here if basis.due]
        with span("refresh", shown=bool(due)):
            self._refresh_from_gradients(due, which, gradients, step.updates)
        runs: list[tuple[Fragment, int]] = []
        for basis in here:
            for name in basis.layers:
                if self._buffer(name) in which:
                    own = self._own(name)
                    if name in self._renewed:
                        self._renew(name, basis.side, self._renewed.pop(name), gradients, own)
                    runs += [(fragment, basis.count + 1) for fragment in own]
        if runs:
            fields = (self._shard.buffers, gradients, self._moments("exp_avg"), self._moments("exp_avg_sq"))
            weights, grads, *moments = ([run_of(flat, fragment) for fragment, _ in runs] for flat in fields)
            low_rank_adam(
                weights,
                grads,
                *moments,
                steps=[count for _, count in runs],
                lr=step.lr,
                betas=step.betas,
                eps=step.eps,
                weight_decay=step.weight_decay,
            )
        self._kept = 1 - step.lr * step.weight_decay

    def end_update(self, updates: int) -> list[int]:
        """Count an update, make the refreshes that need no gradient, have layers prepare for those that do."""
        for basis in self.schedule.bases:
            basis.count += 1
            basis.decay *= self._kept
        self.schedule.plan(updates)
        if self.schedule.projector(updates) != "random":
            return []
        due = [basis for basis in self.schedule.bases if basis.due]
        with span("refresh", shown=bool(due)):
            wanted = [self._wanted(basis, self._whole(basis.any_layer.basis), [], updates) for basis in due]
            for basis, one, found in zip(due, wanted, refresh(wanted, self._exchange), strict=True):
                self._adopt(basis, one.old, *found)
        return sorted({self._buffer(name) for basis in due for name in basis.layers})

    def forget_gradients(self) -> None:
        self.schedule.collect()

    @property
    def made(self) -> int:
        """Refreshes since the start of the run; a shared basis counts once."""
        return sum(basis.refreshes for basis in self.schedule.bases)

    def routes(self) -> dict[str, tuple[int | None, int | None]]:
        bases = self.schedule.bases
        return {f"{name}.R": (layer.rank, basis.owner) for basis in bases for name, layer in basis.layers.items()}

    def summary(self) -> str:
        bases = self.schedule.bases
        layers = [layer for basis in bases for layer in basis.layers.values()]
        if not layers:
            return ""
        size = sum(layer.out_features * layer.in_features for layer in layers)
        chosen = sorted({layer.rank for layer in layers})
        ranks = "-".join(map(str, sorted({chosen[0], chosen[-1]})))
        return f"projected: {len(layers)} matrices with {size:,} elements and {len(bases)} bases of rank {ranks}"

    def numbers(self) -> dict[str, Any]:
        return {"bases": self.schedule.numbers()}

    def load_numbers(self, numbers: Mapping[str, Any]) -> None:
        self.schedule.load_numbers(numbers["bases"])

    def merged(self) -> dict[str, Tensor]:
        return {name: layer.frozen_weight for basis in self.schedule.bases for name, layer in basis.layers.items()}

    def written(self) -> Mapping[str, Tensor]:
        bases = {name: layer.basis for basis in self.schedule.bases for name, layer in basis.layers.items()}
        return {**super().written(), **{f"{name}.basis": basis for name, basis in bases.items()}}

    def _refresh_from_gradients(
        self, due: Sequence[Basis], which: Sequence[int], gradients: Field, updates: int
    ) -> None:
        """Refresh some bases from the gradients that their layers have added up."""
        if not due:
            return
        full = {basis: {name: _take_gradient(layer) for name, layer in basis.layers.items()} for basis in due}
        spoiled = [not all(bool(torch.isfinite(grad).all()) for grad in parts.values()) for parts in full.values()]
        agreed = self._exchange.sum_all(torch.tensor(spoiled, dtype=torch.float32)) == 0
        if self._config.projector not in SKETCHING:
            for grad in (grad for parts in full.values() for grad in parts.values()):
                self._exchange.sum_all(grad)
        ready: list[tuple[Basis, float | None]] = []
        wanted: list[Refresh] = []
        for basis, usable in zip(due, agreed.tolist(), strict=True):
            parts = full.pop(basis)
            old = self._whole(basis.any_layer.basis).to(next(iter(parts.values())).device)
            low = {name: self._low(grad, old, basis.side) for name, grad in parts.items()} if usable else {}
            scale = self._scale(low, which, gradients) if usable else None
            if scale is None:
                basis.waits += usable
                if not usable or basis.waits <= PATIENCE:
                    logger.warning("%s: the refresh waits for the next update; %s", basis.name, WAITING[usable])
                    basis.collect()
                    continue
                logger.warning("%s: refreshed all the same; %s", basis.name, WAITING[usable])
            ready.append((basis, scale))
            sums = [FullGradient(parts[name], low[name]) for name in basis.layers]
            wanted.append(self._wanted(basis, old, sums, updates))
        found = refresh(wanted, self._exchange)
        for (basis, scale), one, (new, turn) in zip(ready, wanted, found, strict=True):
            self._adopt(basis, one.old, new, turn)
            for name, summed in zip(basis.layers, one.gradients, strict=True):
                exact = None if scale is None else self._low(summed.whole, new, basis.side).mul_(scale)
                self._renewed[name] = Renewed(exact, turn)

    def _wanted(self, basis: Basis, old: Tensor, gradients: Sequence[FullGradient], updates: int) -> Refresh:
        return Refresh(
            name=basis.name,
            old=old,
            gradients=gradients,
            side=basis.side,
            projector=self.schedule.projector(updates),
            is_first=not basis.refreshes,
            random=generator(self._seed, basis.name, basis.side, basis.refreshes),
            owner=basis.owner,
            dtype=basis.any_layer.basis.dtype,
        )

    def _scale(self, low: Mapping[str, Tensor], which: Sequence[int], gradients: Field) -> float | None:
        """What the engine has multiplied the summed gradients with; None when they are not those that it has summed."""
        products: list[Tensor] = []
        for name, product in low.items():
            if self._buffer(name) not in which:
                continue
            expected = self._flat(name, product)
            for f in self._own(name):
                delivered = run_of(gradients, f).float()  # of the model's dtype where the masters are
                part = expected[f.start : f.start + f.length].to(delivered.device)
                products.append(torch.stack([delivered.dot(part), part.dot(part), delivered.dot(delivered)]))
        device = gradients[which[0]].device
        sums = torch.stack(products).sum(0) if products else torch.zeros(3, device=device)
        if self._shard.layout.is_replicated(f"{next(iter(low))}.R"):
            # The last bit of a product depends on where in memory it is: with one's own, copies of R would drift apart.
            self._exchange.broadcast(sums, 0)
        else:
            self._exchange.sum(sums)
        self._exchange.broadcast_replicas(sums)
        both, expected_square, delivered_square = sums.tolist()
        if expected_square == delivered_square == 0:
            return 0.0
        if both <= 0 or both * both < PARALLEL * expected_square * delivered_square:
            return None
        return float(both / expected_square)

    def _low(self, grad: Tensor, basis: Tensor, side: Side) -> Tensor:
        """G Q or Pᵀ G of the gradient of all ranks."""
        low = project(grad, basis, side)
        return self._exchange.sum_all(low) if self._config.projector in SKETCHING else low

    def _renew(self, name: str, side: Side, renewed: Renewed, gradients: Field, own: Sequence[Fragment]) -> None:
        """Exchange the delivered gradient of a layer's R for that in the new basis, in place."""
        if renewed.exact is not None:
            new = renewed.exact
        else:
            low = self._exchange.everywhere(f"{name}.R", gradients)
            turn = renewed.turn.to(low.device)
            new = low @ turn.T if side == "right" else turn @ low
        write(self._flat(name, new), gradients, own)

    def _adopt(self, basis: Basis, old: Tensor, new: Tensor, turn: Tensor) -> None:
        """Go over to a new basis: W0 takes R, R becomes zero, moments follow."""
        right = basis.side == "right"
        for name, layer in basis.layers.items():
            r = self._exchange.everywhere(f"{name}.R", self._shard.buffers).to(old.device).float()
            learned = r @ old.T if right else old @ r
            self.frozen_weights.take(name, layer.frozen_weight, learned, decay=basis.decay, count=basis.refreshes)
            own = self._own(name)
            for fragment in own:
                run_of(self._shard.buffers, fragment).zero_()
            if basis.count:
                self._carry_moments(name, own, turn, left=not right)
        write_frozen(basis.any_layer.basis, own_part(basis.any_layer.basis, new))
        basis.refreshed(resets_moments=self._config.moments == "reset")

    def _carry_moments(self, name: str, own: Sequence[Fragment], turn: Tensor, *, left: bool) -> None:
        fields = {key: self._moments(key) for key in ("exp_avg", "exp_avg_sq")}
        match self._config.moments:
            case "reset":
                momentum_reset([run_of(flat, fragment) for fragment in own for flat in fields.values()])
            case "transport" | "transport_first":
                state: State = {k: self._exchange.everywhere(f"{name}.R", flat).float() for k, flat in fields.items()}
                second = self._config.moments == "transport"
                rotate_moments(state, turn.to(fields["exp_avg"][0].device), left=left, second=second)
                for key, flat in fields.items():
                    write(self._flat(name, tensor(state, key)), flat, own)

    def _buffer(self, layer: str) -> int:
        return self._shard.layout.of(f"{layer}.R")[0].buffer

    def _own(self, layer: str) -> Sequence[Fragment]:
        return self._shard.layout.on(f"{layer}.R", self._shard.rank)

    def _flat(self, name: str, whole: Tensor) -> Tensor:
        """The elements of a layer's R, or of something of its shape, in the layout's order."""
        return self._shard.layout.flat(f"{name}.R", whole)

    def _whole(self, parameter: Tensor) -> Tensor:
        """A frozen parameter, whole, fp32, new."""
        start, part = held(parameter)[-1]
        shape = logical_shape(parameter)
        own = torch.zeros(math.prod(shape), device=part.device)
        own[start : start + part.numel()] = part
        whole = in_whole(parameter, own.view(shape))
        is_cut, is_chunk = whole.numel() > own.numel(), part.numel() < own.numel()
        if not is_cut and not is_chunk:
            return whole
        # Every element from one rank, so that the sum is exact.
        if not (is_cut or self._shard.is_first_copy) or not (is_chunk or self._shard.is_first_replica):
            whole.zero_()
        return self._exchange.sum(whole)


def _take_gradient(layer: ProjectedLinear) -> Tensor:
    """The full gradient that a layer has added up; zeros where no backward pass came by, and in other ranks' parts."""
    total, layer.full_gradient = layer.full_gradient, None
    grad = None if total is None else total.value
    if grad is None:
        grad = torch.zeros(layer.out_features, layer.in_features, device=held(layer.frozen_weight)[0][1].device)
    return in_whole(layer.frozen_weight, grad)
