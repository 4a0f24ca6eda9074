"""What the ranks run in the tests of norms on attention heads: a Qwen3 cut by AutoTP or over groups of the user's."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM

import megalr
from megalr.hosts.tensor_parallel import tensor_parallel_cuts
from tests.deepspeed import rule_training
from tests.deepspeed.tensor_training import MODEL, SECTIONS, Units, tensor_configuration, tensor_parallel_groups
from tests.deepspeed.training import finish, run_steps

NORMS = ("q_norm", "k_norm")
HEAD = 8

# As a user writes it for a model whose own plan says nothing about the norms.
SPECS = [
    {"patterns": [r".*\.(q|k|v|gate|up)_proj\.weight$"], "partition_type": "column"},
    {"patterns": [r".*\.(o|down)_proj\.weight$"], "partition_type": "row"},
]
SUMMED = [*SPECS, {"patterns": [r".*\.[qk]_norm\.weight$"], "partition_type": "skip", "grad_allreduce": True}]


class Trained(NamedTuple):
    """What one rank has after training.

    Attributes:
        weights: on rank 0 those of the dense model.
        apart: of what every rank has whole, the names of what is not the same bit for bit.
        message: of the UserError that ended it.
    """

    weights: dict[str, Tensor] | None
    apart: list[str]
    message: str


def qwen3(*, own_norms: bool = False, frozen: tuple[str, ...] = ()) -> Qwen3ForCausalLM:
    """The same in every process; its norms are drawn, and have biases if they are not transformers' own."""
    torch.manual_seed(0)
    sizes = {**MODEL, "num_key_value_heads": 2, "head_dim": HEAD, "initializer_range": 0.02, "pad_token_id": 0}
    model = Qwen3ForCausalLM(Qwen3Config(**sizes))
    for layer in model.model.layers if own_norms else ():
        for name in NORMS:
            setattr(layer.self_attn, name, nn.LayerNorm(HEAD))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, mean=float(name.endswith("weight")), std=0.1)
        parameter.requires_grad_(not any(part in name for part in frozen))
    return model


def train(
    tensor: int,
    stage: int,
    kind: str,
    *,
    autotp: bool = False,
    second_way: bool = False,
    specs: list[dict[str, Any]] | None = None,
    model: dict[str, Any] | None = None,
    section: dict[str, Any] | None = None,
    **changes: Any,
) -> Trained:
    """Twelve updates.

    Args:
        tensor, stage: as elsewhere; with one tensor-parallel rank there is no ``mpu``.
        kind: a key of :data:`~tests.deepspeed.tensor_training.SECTIONS`.
        autotp: cut by "autotp_size", not by ``mpu``.
        second_way: by ``megalr.build_optimizer``.
        specs: the JSON's "layer_specs".
        model: arguments of :func:`qwen3`.
        section: added to "megalr".
        **changes: as of :func:`~tests.deepspeed.tensor_training.tensor_configuration`.
    """
    content = copy.deepcopy(SECTIONS[kind]) | (section or {})
    config = tensor_configuration(tensor, stage, "AdamW", megalr=content, **changes)
    by_units = tensor > 1 and not autotp
    if by_units:
        del config["tensor_parallel"]
    if specs is not None and tensor > 1:
        plan = {"use_default_specs": False, "layer_specs": specs}
        config.setdefault("tensor_parallel", {})["partition_config"] = plan
    with tensor_parallel_groups():
        whole = qwen3(**(model or {}))
        if second_way:
            optimizer = megalr.build_optimizer(whole, config)
            rest = {
                key: value for key, value in config.items() if key not in ("optimizer", "megalr", "train_batch_size")
            }
            rest["zero_allow_untested_optimizer"] = True
            engine = deepspeed.initialize(model=whole, optimizer=optimizer, config=rest)[0]
        else:
            engine = megalr.initialize(model=whole, config=config, mpu=Units() if by_units else None)[0]
        try:
            run_steps(engine, rule_training.batches(rule_training.STEPS), tensor=tensor)
        except megalr.UserError as error:
            engine.destroy()
            return Trained(None, [], str(error))
        apart = _apart(engine.module) if stage < 3 else []
        return Trained(finish(engine, config), apart, "")


def _apart(module: nn.Module) -> list[str]:
    copies = {n: p.detach().clone() for n, p in module.named_parameters() if not tensor_parallel_cuts({n: p})}
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, copies)
    return [name for name in copies if any(not torch.equal(each[name], found[0][name]) for each in found)]
