"""Bases of projected layers: refreshed from full gradients, with W0 taking over what R has learnt.

A refresh at update t gives what GaLore's gives, and no other update has the gradient of a whole matrix:

1. During update t the layer's backward passes add up the gradient G of the whole weight beside that of R.
2. G, or its products with thin matrices alone where the projector needs no more, is summed over the ranks.
3. One rank computes the basis, all receive it, and W0 takes R Qᵀ.
4. R starts again at zero; its moments are kept, reset or transported; its gradient becomes G Q with the new Q.

What DeepSpeed delivers as R's gradient is s G Q with the *old* Q, where s stands for averaging, loss scale and
clipping. Both are known here, so s is measured instead of computed from settings; and where the two are not parallel,
as after an update that DeepSpeed has skipped, G is not this update's and the refresh waits for the next.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from megalr.hosts import held as frozen_parts
from megalr.hosts import logical_shape
from megalr.hosts.tensor_parallel import in_whole, own_part
from megalr.layers.projected import ProjectedConfig, ProjectedLinear
from megalr.layout.exchange import Exchange, Field, run_of, write
from megalr.layout.layout import Fragment
from megalr.layout.shard import Shard
from megalr.ops import low_rank_adam, momentum_reset
from megalr.optim.events.base import LayerEvents, Moments, Step
from megalr.optim.frozen_weights import Merging
from megalr.rules.adam import rotate_moments
from megalr.rules.base import State, tensor
from megalr.rules.bases import Projector, Side, SummedMatrix, leading_basis, random_basis, sketched_basis
from megalr.seeding import generator

logger = logging.getLogger(__name__)

PARALLEL = 0.98  # the least squared cosine between the two gradients of R; rounding to bf16 leaves more than 0.999
SKETCHING: tuple[Projector, ...] = ("power", "randomized")  # need no more of G than products with thin matrices
# Updates that a refresh waits for a full gradient to agree with R's. One that was skipped explains a single time; after
# more, something changes R's gradient on its way, and the refresh does without its exact counterpart in the new basis.
PATIENCE = 3
WAITING = {
    True: "R's gradient is not the full gradient times the basis: an update was skipped, or a hook, a penalty or "
    "clipping by value changes it",
    False: "the full gradient is not finite",
}
COUNTS = ("refreshes", "count", "decay", "due")


@dataclass(eq=False)
class Basis:
    """A basis, and the layers that have it: one, or those of a group that reads the same input.

    Attributes:
        name: of the first layer's weight; keys random numbers.
        layers: by qualified name, those whose R is trained.
        phase: updates ≡ phase modulo the gap are due for a refresh.
        owner: the rank that computes the basis.
        due: whether a refresh is due and has not been made.
        refreshes: made so far.
        count: updates since R's moments were zero.
        waits: updates that the refresh which is due has waited so far for a gradient that agrees.
        decay: what weight decay has left of W0 since W0 last took R Qᵀ; applied to it when it does so again.
    """

    name: str
    layers: dict[str, ProjectedLinear]
    phase: int = 0
    owner: int = 0
    due: bool = False
    refreshes: int = 0
    count: int = 0
    waits: int = 0
    decay: float = 1.0
    side: Side = field(init=False)

    def __post_init__(self) -> None:
        self.side = self.any_layer.side

    @property
    def any_layer(self) -> ProjectedLinear:
        """One of the layers, for what they share."""
        return next(iter(self.layers.values()))

    def collect(self, collecting: bool) -> None:
        """Have the layers add up their full gradients from now on, or stop that; drop what they have."""
        for layer in self.layers.values():
            layer.collecting, layer.full_gradient = collecting, None


class Projections(LayerEvents):
    """The bases of a model's projected layers, and AdamW on their R.

    Attributes:
        bases: all of them, in the model's order.
    """

    group: ClassVar[str] = "projected"

    def __init__(self, layers: Mapping[str, Any], config: ProjectedConfig, seed: int) -> None:
        """
        Args:
            layers: the model's, by qualified name; those whose R is not trained are left alone.
            config: the "parametrization" section.
            seed: key of random bases.
        """
        self.bases: list[Basis] = []
        by_basis: dict[int, Basis] = {}
        for name, layer in layers.items():
            if not layer.R.requires_grad:
                continue
            if id(layer.basis) not in by_basis:
                by_basis[id(layer.basis)] = Basis(f"{name}.weight", {name: layer})
                self.bases.append(by_basis[id(layer.basis)])
            else:
                by_basis[id(layer.basis)].layers[name] = layer
        self.remainders: dict[str, Tensor] = {}
        self._config, self._seed = config, seed
        # By layer, until R's buffer is stepped: the gradient in the new basis, or what turns the delivered one into it.
        self._renewed: dict[str, Tensor] = {}
        self._turned: dict[str, Tensor] = {}
        self._kept = 1.0  # what the last update's weight decay left of a weight
        for index, basis in enumerate(self.bases):
            basis.phase = index * config.update_proj_gap // len(self.bases) if config.stagger else 0
            basis.refreshes = int(self._projector(0) == "random")  # it started with one
        self._plan(0)

    def attach(self, shard: Shard, exchange: Exchange, moments: Moments) -> None:
        super().attach(shard, exchange, moments)
        for index, basis in enumerate(self.bases):
            basis.owner = index % shard.layout.world_size
        self.merging = Merging(self._config.merge_rounding, shard, exchange, self._seed, self.remainders, "R")

    def update(self, which: Sequence[int], gradients: Field, step: Step) -> None:
        """Refresh the bases that are due, then AdamW on all R that lie in some of the flat buffers; collective."""
        here = [basis for basis in self.bases if any(self._buffer(name) in which for name in basis.layers)]
        self._refresh([basis for basis in here if basis.due], which, gradients, step.updates)
        runs: list[tuple[Fragment, int]] = []
        for basis in here:
            for name in basis.layers:
                if self._buffer(name) not in which:
                    continue
                own = self._shard.layout.on(f"{name}.R", self._shard.rank)
                if name in self._renewed:
                    write(self._flat(name, self._renewed.pop(name)), gradients, own)
                elif name in self._turned:
                    low, turn = self._exchange.everywhere(f"{name}.R", gradients), self._turned.pop(name)
                    turn = turn.to(low.device)
                    turned = low @ turn.T if basis.side == "right" else turn @ low
                    write(self._flat(name, turned), gradients, own)
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
        for basis in self.bases:
            basis.count += 1
            basis.decay *= self._kept
        self._plan(updates)
        if self._projector(updates) != "random":
            return []
        due = [basis for basis in self.bases if basis.due]
        for basis in due:
            old = self._whole(basis.any_layer.basis)
            self._adopt(basis, old, self._new_basis(basis, old, None, updates))
        return sorted({self._buffer(name) for basis in due for name in basis.layers})

    def forget_gradients(self) -> None:
        """Drop what the layers have added up, and have those add up from now on whose basis is due."""
        for basis in self.bases:
            basis.collect(basis.due)

    @property
    def made(self) -> int:
        """Refreshes since the start of the run; a shared basis counts once."""
        return sum(basis.refreshes for basis in self.bases)

    def routes(self) -> dict[str, tuple[int, int | None]]:
        return {f"{name}.R": (layer.rank, basis.owner) for basis in self.bases for name, layer in basis.layers.items()}

    def summary(self) -> str:
        layers = [layer for basis in self.bases for layer in basis.layers.values()]
        if not layers:
            return ""
        size = sum(layer.out_features * layer.in_features for layer in layers)
        chosen = sorted({layer.rank for layer in layers})
        ranks = "-".join(map(str, sorted({chosen[0], chosen[-1]})))
        return f"projected: {len(layers)} matrices with {size:,} elements and {len(self.bases)} bases of rank {ranks}"

    def numbers(self) -> dict[str, Any]:
        return {"bases": {basis.name: {key: getattr(basis, key) for key in COUNTS} for basis in self.bases}}

    def load_numbers(self, numbers: Mapping[str, Any]) -> None:
        for basis in self.bases:
            for key in COUNTS:
                setattr(basis, key, numbers["bases"][basis.name][key])
        self.forget_gradients()

    def merged(self) -> dict[str, Tensor]:
        return {name: layer.weight for basis in self.bases for name, layer in basis.layers.items()}

    def _plan(self, updates: int) -> None:
        """Note whose turn it is at the next update."""
        for basis in self.bases:
            started_random = not updates and basis.refreshes
            basis.due |= updates % self._config.update_proj_gap == basis.phase and not started_random
        self.forget_gradients()

    def _projector(self, updates: int) -> Projector:
        start = self._config.random_from
        return "random" if start is not None and updates >= start else self._config.projector

    def _buffer(self, layer: str) -> int:
        return self._shard.layout.of(f"{layer}.R")[0].buffer

    def _refresh(self, due: Sequence[Basis], which: Sequence[int], gradients: Field, updates: int) -> None:
        """Refresh some bases from the gradients that their layers have added up."""
        if not due:
            return
        full = {basis: {name: _take_gradient(layer) for name, layer in basis.layers.items()} for basis in due}
        spoilt = [not all(bool(torch.isfinite(grad).all()) for grad in parts.values()) for parts in full.values()]
        agreed = self._exchange.sum_all(torch.tensor(spoilt, dtype=torch.float32)) == 0
        if self._config.projector not in SKETCHING:
            for grad in (grad for parts in full.values() for grad in parts.values()):
                self._exchange.sum_all(grad)
        fresh: list[tuple[Basis, float | None, Tensor, Tensor]] = []
        for basis, usable in zip(due, agreed.tolist(), strict=True):
            old = self._whole(basis.any_layer.basis).to(next(iter(full[basis].values())).device)
            low = {name: self._low(grad, old, basis.side) for name, grad in full[basis].items()} if usable else {}
            scale = self._scale(low, which, gradients) if usable else None
            if scale is None:
                basis.waits += usable
                if not usable or basis.waits <= PATIENCE:
                    logger.warning("%s: the refresh waits for the next update; %s", basis.name, WAITING[usable])
                    basis.collect(True)
                    del full[basis]
                    continue
                logger.warning("%s: refreshed all the same; %s", basis.name, WAITING[usable])
            parts = [(full[basis][name], low[name]) for name in basis.layers]
            fresh.append((basis, scale, old, self._new_basis(basis, old, parts, updates)))
        for basis, scale, old, found in fresh:
            new = self._adopt(basis, old, found)
            for name, grad in full.pop(basis).items():
                if scale is None:
                    self._turned[name] = new.T @ old
                else:
                    self._renewed[name] = self._low(grad, new, basis.side).mul_(scale)

    def _scale(self, low: Mapping[str, Tensor], which: Sequence[int], gradients: Field) -> float | None:
        """What DeepSpeed has multiplied the summed gradients with; None when they are not those that it has summed."""
        products: list[Tensor] = []
        for name, product in low.items():
            if self._buffer(name) not in which:
                continue
            expected = self._flat(name, product)
            for f in self._shard.layout.on(f"{name}.R", self._shard.rank):
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
        low = grad @ basis if side == "right" else basis.T @ grad
        return self._exchange.sum_all(low) if self._config.projector in SKETCHING else low

    def _new_basis(self, basis: Basis, old: Tensor, parts: list[tuple[Tensor, Tensor]] | None, updates: int) -> Tensor:
        """A new basis where this rank is the owner, or all have to work on it; else memory for it.

        Args:
            basis, updates: as elsewhere.
            old: the basis that it had.
            parts: of each layer its full gradient and that times the old basis; None for a random basis.
        """
        size, rank = old.shape
        random = generator(self._seed, basis.name, basis.side, basis.refreshes)
        previous = old if basis.refreshes else None
        projector = self._projector(updates)
        if parts is not None and projector in SKETCHING:
            summed = SummedMatrix(_stack([grad for grad, _ in parts]), self._exchange.sum_all)
            product = _stack([low if basis.side == "right" else low.T for _, low in parts])
            found = sketched_basis(
                summed, rank, basis.side, projector, previous=previous, product=product, generator=random
            )
            if torch.isfinite(found).all():
                return found
            logger.warning("%s: %s gave a basis that is not finite; the old one stays", basis.name, projector)
            return old.clone()  # the owner's word counts, so ranks need not agree
        if basis.owner != self._shard.rank:
            return torch.empty_like(old)
        if parts is None:
            return random_basis(size, rank, random, old.device)
        stack = _stack([grad for grad, _ in parts])
        return leading_basis(stack, rank, basis.side, projector, previous=previous, generator=random, name=basis.name)

    def _adopt(self, basis: Basis, old: Tensor, found: Tensor) -> Tensor:
        """Make the owner's basis everyone's: W0 takes over R, R becomes zero, moments follow; returns the new basis."""
        self._exchange.broadcast(found, basis.owner)
        self._exchange.broadcast_replicas(found)
        new = found.to(basis.any_layer.basis.dtype).float()  # as the model has it
        right = basis.side == "right"
        for name, layer in basis.layers.items():
            r = self._exchange.everywhere(f"{name}.R", self._shard.buffers).to(old.device).float()
            learnt = r @ old.T if right else old @ r
            self.merging.take(name, layer.weight, learnt, decay=basis.decay, count=basis.refreshes)
            own = self._shard.layout.on(f"{name}.R", self._shard.rank)
            for fragment in own:
                run_of(self._shard.buffers, fragment).zero_()
            if basis.count:
                self._carry_moments(name, own, new.T @ old, left=not right)
        own_rows = own_part(basis.any_layer.basis, new).reshape(-1)
        for start, part in frozen_parts(basis.any_layer.basis):
            part.copy_(own_rows[start : start + part.numel()])
        if self._config.moments == "reset":
            basis.count = 0
        basis.refreshes, basis.decay, basis.due, basis.waits = basis.refreshes + 1, 1.0, False, 0
        basis.collect(False)
        return new

    def _carry_moments(self, name: str, own: Sequence[Fragment], turn: Tensor, *, left: bool) -> None:
        fields = {key: self._moments(key) for key in ("exp_avg", "exp_avg_sq")}
        match self._config.moments:
            case "reset":
                momentum_reset([run_of(flat, fragment) for fragment in own for flat in fields.values()])
            case "transport":
                state: State = {k: self._exchange.everywhere(f"{name}.R", flat).float() for k, flat in fields.items()}
                rotate_moments(state, turn.to(fields["exp_avg"][0].device), left=left)
                for key, flat in fields.items():
                    write(self._flat(name, tensor(state, key)), flat, own)

    def _flat(self, name: str, whole: Tensor) -> Tensor:
        """The elements of a layer's R, or of something of its shape, in the layout's order."""
        return self._shard.layout.flat(f"{name}.R", whole)

    def _whole(self, parameter: Tensor) -> Tensor:
        """A frozen parameter, whole, fp32, new."""
        start, part = frozen_parts(parameter)[-1]
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
    grad, layer.full_gradient = layer.full_gradient, None
    if grad is None:
        grad = torch.zeros(layer.out_features, layer.in_features, device=frozen_parts(layer.weight)[0][1].device)
    return in_whole(layer.weight, grad)


def _stack(matrices: list[Tensor]) -> Tensor:
    return matrices[0] if len(matrices) == 1 else torch.cat(matrices)
