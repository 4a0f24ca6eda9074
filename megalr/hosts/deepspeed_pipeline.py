"""DeepSpeed's pipeline engine, of which each stage has layers of its own, and what cannot be had together with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import clip_grads_with_norm_

from megalr.agreement import gathered
from megalr.errors import UserError
from megalr.hosts.deepspeed import ENGINE, DeepSpeedEngine
from megalr.rules.base import Rule
from megalr.schema import Json

UNGUARDED = (
    "guards do not see the losses and steps of pipeline engines: leave megalr.guards out. Gradients that are not "
    "finite make no update there all the same"
)


MODULE = "deepspeed.runtime.pipe.module.PipelineModule"
TOPOLOGY = "the topology of a PipelineModule"
GRID = "the mpu of a PipelineModule"
TIED = "a parameter of a PipelineModule"

# What this file reads of DeepSpeed; held by tests/deepspeed/test_contract.py.
INTERNALS = {
    MODULE: ("mpu", "num_stages", "tied_comms", "topology"),
    TOPOLOGY: ("get_dim",),
    GRID: ("get_pipe_parallel_group",),
    ENGINE: ("basic_optimizer", "clip_fp32_gradients", "gradient_clipping", "module"),
    TIED: ("ds_pipe_replicated",),
}


class DeepSpeedPipeline(DeepSpeedEngine):
    """A pipeline engine: ``module`` has this stage's layers, and one call makes a whole update."""

    has_stages = True

    def ends_update(self) -> bool:
        return True

    def progress(self) -> tuple[int, int]:
        return 0, super().progress()[1]

    @property
    def awaits_step(self) -> bool:
        return False  # a pipeline makes its passes and its step in one call


def check_pipeline(model: nn.Module, tensor: int, *, guarded: bool) -> None:
    """Raise a UserError for a ``PipelineModule`` that is to be guarded, or whose layers ranks are to share, or do.

    Args:
        model: of any kind.
        tensor: tensor-parallel ranks that the configuration asks for.
        guarded: whether it asks for guards.
    """
    if not has_stages(model):
        return
    pipeline: Any = model
    if max(tensor, pipeline.topology().get_dim("model")) > 1:
        raise UserError(
            "tensor parallelism together with pipeline stages is not supported: use one of them, with a "
            '"tensor_parallel.autotp_size" of 1 and a topology without a "model" axis for pipeline stages'
        )
    if guarded:
        raise UserError(UNGUARDED)


def check_rules(model: nn.Module, rules: Mapping[str, tuple[Rule, nn.Parameter]]) -> None:
    """Raise a UserError for a rule of which stages would make another one. Collective, for a ``PipelineModule``.

    Args:
        model: of any kind.
        rules: by qualified name, of this stage's matrices, with these.
    """
    if not has_stages(model):
        return
    pipeline: Any = model
    shared = {id(p) for comm in pipeline.tied_comms.values() for p in comm["module"].parameters()}
    wrong = ""
    for name, (rule, parameter) in rules.items():
        if rule.not_in_stages:
            wrong = f"{rule.type_name} does not work with pipeline stages: {rule.not_in_stages}"
        elif id(parameter) in shared and rule.phase(1, 2):
            wrong = (
                f"pipeline stages share {name}, and would refresh its basis at different updates: write "
                '"stagger": false in optimizer.params, or leave it to AdamW'
            )
    found = list(filter(None, gathered(wrong)))
    if found:
        raise UserError(found[0])


def check_stages(model: nn.Module, content: Json, groups: int) -> None:
    """Raise a UserError for pipeline stages that would wait for each other. Collective, for a ``PipelineModule``.

    Args:
        model: of any kind.
        content: the DeepSpeed JSON.
        groups: how many groups of parameters the optimizer of this stage has.
    """
    if not has_stages(model) or not (content.get("zero_optimization") or {}).get("stage", 0):
        return
    counts = gathered(groups)
    if len(set(counts)) > 1:
        raise UserError(
            f"pipeline stages have {' and '.join(map(str, sorted(set(counts))))} groups of parameters (of matrices, of "
            "norms and biases, ...), and DeepSpeed's ZeRO, which adds up norms group by group, would wait for ever: "
            "use ZeRO stage 0, or stages with the same kinds of parameters"
        )


def join_stages(engine: Any) -> None:
    """Have all stages of a pipeline skip an update together, and clip gradients by the norm over all of them.

    At stage 0 in fp32, where nobody else looks at gradients, DeepSpeed clips by the norm over the first stage alone.

    Args:
        engine: of any kind, with megalr's optimizer.
    """
    model = engine.module
    if not has_stages(model) or model.num_stages < 2:  # noqa: PLR2004
        return
    group = model.mpu().get_pipe_parallel_group()
    engine.basic_optimizer.stages = group
    engine.clip_fp32_gradients = lambda: _clip(model, group, engine.gradient_clipping())


def _clip(model: nn.Module, group: dist.ProcessGroup, most: float) -> None:
    """As torch does, with what stages share counted once. Collective."""
    parameters = list(model.parameters())
    total = torch.zeros((), device=parameters[0].device)
    for parameter in parameters:
        if parameter.grad is not None and not getattr(parameter, "ds_pipe_replicated", False):
            total += parameter.grad.float().square().sum()
    dist.all_reduce(total, group=group)
    clip_grads_with_norm_(parameters, most, total.sqrt())


def has_stages(model: nn.Module) -> bool:
    """Whether it is a ``PipelineModule``, of which each stage has layers of its own."""
    return callable(getattr(model, "topology", None))
