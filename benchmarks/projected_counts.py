"""Bytes that a rank holds and sends at ZeRO stage 2 in fp32, from shapes alone; and the activations that are saved."""

from __future__ import annotations

import copy
import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from benchmarks.projected_methods import MATRIX_GROUPS, prepare
from megalr.layers import projected_layers
from megalr.layout.layout import Layout
from megalr.layout.planned import planned_layout
from megalr.memory.formulas import RankBytes, deepspeed_bytes, frozen_shapes
from megalr.optim.matrices import choose_owners, kept_bytes
from megalr.train.models import build_model, empty_model

if TYPE_CHECKING:
    from transformers import LlamaConfig

    from megalr.rules.base import Rule

STAGE = 2
FP32 = 4  # bytes
# Bytes of scalars that every step all-reduces, whatever the model and the method: DeepSpeed's and megalr's votes and
# norms, and the three numbers by which the guard compares losses.
VOTES = 16 + 24
# Of each basis in a refresh: one vote on its gradients, three scalar products.
REFRESH_SCALARS = 4
# R's size is all-reduced so often in a refresh: G Q_old, which is compared with what was delivered and begins the power
# step, R itself for the merge, and G Q with the new basis.
REFRESH_PASSES = 3


@dataclass(frozen=True, kw_only=True)
class Groups:
    """Shapes of what is trained and what is not, for a whole model or its matrices alone.

    Attributes:
        trained: for each of the optimizer's groups, its parameters' shapes by name.
        frozen: shapes of frozen parameters.
        bases: for each basis of projected layers, its elements and those of all R that it serves.
        rule: updates the groups in ``treated``.
        treated: indices of groups.
    """

    trained: Sequence[Mapping[str, tuple[int, ...]]]
    frozen: Sequence[tuple[int, ...]]
    bases: Sequence[tuple[int, int]] = ()
    rule: Rule | None = None
    treated: Sequence[int] = ()

    def layout(self, world_size: int) -> Layout:
        """How DeepSpeed cuts them at stage 2."""
        return planned_layout(self.trained, stage=STAGE, world_size=world_size)


@dataclass(frozen=True, kw_only=True)
class Sent:
    """Bytes that one rank sends in a step, on average over a gap.

    Attributes:
        reduced: gradients, all-reduced as DeepSpeed does it at stage 2, and votes.
        gathered: updated weights.
        moved: whole matrices to and from the rank that runs a rule on them.
        refreshes: for new bases, a gap's divided by its updates.
    """

    reduced: float
    gathered: float
    moved: float
    refreshes: float

    @property
    def ordinary(self) -> float:
        """In a step without a refresh."""
        return self.reduced + self.gathered + self.moved

    @property
    def total(self) -> float:
        """All four."""
        return self.ordinary + self.refreshes


def groups_of(config: LlamaConfig, method: str, rank: int, *, matrices_alone: bool = False) -> Groups:
    """The shapes of a LLaMA under one of the methods.

    Args:
        config: its shape.
        method: a key of :data:`benchmarks.projected_methods.TITLES`.
        rank: r.
        matrices_alone: leave out embeddings, head and norms, of which no method here changes anything.
    """
    model = empty_model(config)
    parsed, groups = prepare(model, method, rank, gap=1)
    groups = [group for group in groups if not matrices_alone or group.name in MATRIX_GROUPS]
    bases: dict[int, tuple[int, int]] = {}
    for layer in projected_layers(model).values():
        served = bases.get(id(layer.basis), (0, 0))[1]
        bases[id(layer.basis)] = (layer.basis.numel(), served + layer.R.numel())
    return Groups(
        trained=[{name: tuple(p.shape) for name, p in group.parameters.items()} for group in groups],
        frozen=frozen_shapes(model),
        bases=list(bases.values()),
        rule=parsed.optimizer.rule,
        treated=[index for index, group in enumerate(groups) if group.name == "matrices"],
    )


def held_bytes(groups: Groups, world_size: int) -> RankBytes:
    """Of the rank that holds most, each of the four parts on its own, since ranks differ in what they own."""
    state = [0] * world_size
    if groups.rule is not None:
        state = kept_bytes(groups.rule, _treated(groups, world_size), seed=0, replicated=False)
    ranks = [
        deepspeed_bytes(
            [list(group.values()) for group in groups.trained],
            stage=STAGE,
            world_size=world_size,
            rank=rank,
            treated=groups.treated,
            treated_bytes=state[rank],
            frozen=groups.frozen,
        )
        for rank in range(world_size)
    ]
    parts = ("weights", "gradients", "masters", "optimizer_state")
    return RankBytes(**{part: max(getattr(held, part) for held in ranks) for part in parts})


def sent_by_formula(groups: Groups, world_size: int, rank: int, gap: int, *, votes: int = VOTES) -> Sent:
    """What a rank sends, by the accounting of :mod:`benchmarks.accounting`.

    With T trained elements, T' with padding, P ranks and 4 bytes each: 2 · 4 T (P-1)/P for the gradients and
    4 T' (P-1)/P for the weights. A rule's matrix that is cut travels to its owner and back. A refresh by "power" of a
    basis with B elements and the layers that it serves, of R elements, all-reduces 4 R + B elements, and its owner
    broadcasts B. Every basis is refreshed once in a gap.

    Args:
        groups: what is trained and frozen.
        world_size: P.
        rank: whose bytes; ranks differ in what they own.
        gap: updates between two refreshes of a basis.
        votes: bytes of scalars all-reduced in every step.
    """
    all_reduced = 2 * (world_size - 1) / world_size
    layout = groups.layout(world_size)
    elements = sum(map(layout.numel, layout.shapes))
    held = deepspeed_bytes([list(g.values()) for g in groups.trained], stage=STAGE, world_size=world_size)
    refreshed = 0.0
    for index, (basis, served) in enumerate(groups.bases):
        refreshed += all_reduced * FP32 * (REFRESH_PASSES * served + basis + REFRESH_SCALARS)
        refreshed += FP32 * basis * (world_size - 1) * (index % world_size == rank)
    return Sent(
        reduced=all_reduced * (FP32 * elements + votes),
        gathered=held.masters * (world_size - 1),  # this rank's part goes to every other
        moved=_moved(groups, world_size, rank),
        refreshes=refreshed / gap if world_size > 1 else 0.0,
    )


def mean_sent(groups: Groups, world_size: int, gap: int, *, votes: int = VOTES) -> Sent:
    """:func:`sent_by_formula`, averaged over the ranks."""
    ranks = [vars(sent_by_formula(groups, world_size, rank, gap, votes=votes)) for rank in range(world_size)]
    return Sent(**{key: sum(sent[key] for sent in ranks) / world_size for key in ranks[0]})


def saved_activations(config: LlamaConfig, method: str, rank: int, sequences: int, length: int) -> int:
    """Bytes that one forward pass with its loss saves for the backward pass, parameters and buffers left out.

    Really computed, since which attention kernel runs, and so what it saves, depends on the device; but with one and
    with two layers only: all layers save the same, so the rest follows, exactly and without the whole model's memory.

    Args:
        config: the model's shape.
        method, rank: as for :func:`groups_of`.
        sequences, length: of the batch, whose tokens are random.
    """
    one, two = (_saved(_with_layers(config, layers), method, rank, sequences, length) for layers in (1, 2))
    return one + (config.num_hidden_layers - 1) * (two - one)


def saved_bytes(model: nn.Module, ids: Tensor) -> int:
    """Bytes of all storages that autograd saves in ``model(input_ids=ids, labels=ids).loss``, each once.

    Parameters and buffers are left out. Unlike a tensor's size, a storage's is what a saved view keeps alive.
    """
    kept = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept |= {ids.untyped_storage().data_ptr()}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in kept:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # an operation's own output, as it is, would keep the operation alive for ever

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids).loss
    total = sum(seen.values())
    del loss  # until here nothing that was saved can be freed and its address be given away
    return total


def random_tokens(config: LlamaConfig, sequences: int, length: int, seed: int = 0) -> Tensor:
    """(sequences, length) token numbers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, config.vocab_size, (sequences, length), generator=generator)


def _saved(config: LlamaConfig, method: str, rank: int, sequences: int, length: int) -> int:
    model = build_model(config, seed=0)
    prepare(model, method, rank, gap=1)
    saved = saved_bytes(model, random_tokens(config, sequences, length))
    del model
    gc.collect()  # a model is in cycles with its own modules, and the next one may be as large
    return saved


def _with_layers(config: LlamaConfig, layers: int) -> LlamaConfig:
    changed = copy.deepcopy(config)
    changed.num_hidden_layers = layers
    return changed


def _treated(groups: Groups, world_size: int) -> Layout:
    """The layout of the matrices that the rule updates."""
    return groups.layout(world_size).matrices(name for index in groups.treated for name in groups.trained[index])


def _moved(groups: Groups, world_size: int, rank: int) -> float:
    """Bytes of gradients that a rank sends to owners, and of updates that it sends back as one."""
    if groups.rule is None:
        return 0
    layout, elements = _treated(groups, world_size), 0
    for name, owner in zip(layout.shapes, choose_owners(groups.rule, layout), strict=True):
        if not layout.is_whole_on(name, owner):
            pieces = layout.of(name)
            elements += sum(f.length for f in pieces if (f.rank == rank != owner) or (f.rank != rank == owner))
    return FP32 * elements
