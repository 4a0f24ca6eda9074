"""What a method of training holds in memory, by formula."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from megalr.config.settings import ParametrizationConfig
from megalr.layout.planned import planned_layout
from megalr.memory.formulas import (
    ParameterRecord,
    RankBytes,
    buffer_bytes,
    deepspeed_bytes,
    frozen_shapes,
    merged_shapes,
    paper_bytes,
)
from megalr.optim.groups import ParameterGroup
from megalr.optim.matrices import kept_bytes, papers_floats


@dataclass(frozen=True, kw_only=True)
class MethodMemory:
    """What a method holds.

    Attributes:
        parameters: all of them.
        trained: parameters that are trained.
        papers: bytes as the papers count them, see :func:`megalr.memory.formulas.paper_bytes`.
        ranks: bytes of each rank under DeepSpeed, see :func:`megalr.memory.formulas.deepspeed_bytes`.
    """

    parameters: int
    trained: int
    papers: int
    ranks: list[RankBytes]

    @property
    def largest(self) -> int:
        """Bytes of the rank that holds the most."""
        return max(rank.total for rank in self.ranks)


def method_memory(
    model: nn.Module,
    groups: Sequence[ParameterGroup],
    parametrization: ParametrizationConfig,
    *,
    stage: int,
    world_size: int,
    dtype: torch.dtype,
    seed: int = 0,
) -> MethodMemory:
    """Count a method's parameters and bytes.

    Args:
        model: with its layers replaced, on the meta device.
        groups: the model's parameter groups; those with a rule keep the rule's state.
        parametrization: by which the layers were replaced.
        stage: ZeRO stage.
        world_size: data-parallel ranks.
        dtype: of the weights.
        seed: of what rests, see :meth:`megalr.rules.base.Rule.resting`.
    """
    shapes = [{name: tuple(parameter.shape) for name, parameter in group.parameters.items()} for group in groups]
    treated = [index for index, group in enumerate(groups) if group.rule is not None]
    kept = [0] * world_size
    if treated:
        rules = {name: group.rule for group in groups if group.rule is not None for name in group.parameters}
        layout = planned_layout(shapes, stage=stage, world_size=world_size).matrices(rules)
        kept = kept_bytes(rules, layout, seed=seed, replicated=stage == 0)
    ranks = [
        deepspeed_bytes(
            [list(group.values()) for group in shapes],
            stage=stage,
            world_size=world_size,
            rank=rank,
            dtype=dtype,
            treated=treated,
            treated_bytes=own,
            frozen=frozen_shapes(model),
            buffers=buffer_bytes(model),
            merged=merged_shapes(model, parametrization),
        )
        for rank, own in enumerate(kept)
    ]
    state = _papers_state(groups, seed)

    def own_state(record: ParameterRecord) -> int | None:
        return state.get(record.name)

    parameters = list(model.parameters())
    return MethodMemory(
        parameters=sum(p.numel() for p in parameters),
        trained=sum(p.numel() for p in parameters if p.requires_grad),
        papers=paper_bytes(model, treated_state=own_state),
        ranks=ranks,
    )


def _papers_state(groups: Sequence[ParameterGroup], seed: int) -> dict[str, int]:
    """Floats of state that rules keep for each of their parameters, as the papers count them."""
    state: dict[str, int] = {}
    for group in groups:
        if group.rule is None:
            continue
        resting = group.rule.resting(list(group.parameters), 0, seed)
        for name, parameter in group.parameters.items():
            *stack, m, n = (1, *parameter.shape)  # a vector is a row
            count = 0 if name in resting else math.prod(stack)
            state[name] = count * papers_floats(group.rule, (m, n))
    return state
