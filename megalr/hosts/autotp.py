"""What DeepSpeed's "tensor_parallel" section asks for: how many ranks, their groups, and which layer is cut how."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any, Literal, NamedTuple

import torch.distributed as dist
from torch import nn

from megalr.errors import UserError, in_short
from megalr.hosts.tensor_parallel import tensor_parallel_cuts
from megalr.naming import named_modules

# Of the weight: column-parallel in Megatron-LM's words, the same with whole outputs on every rank, and row-parallel.
Cut = Literal["rows", "gathered", "columns"]
HEADS = ("num_attention_heads", "num_key_value_heads")

CONFIG = "deepspeed.runtime.tensor_parallel.config"
PARTITION = "deepspeed.module_inject.autotp_config"
SPEC = "a layer's spec in AutoTP's configuration"
CONVERTER = "deepspeed.module_inject.tp_plan_converter.TPPlanConverter"

# What this file reads of DeepSpeed; held by tests/deepspeed/test_contract.py.
INTERNALS = {
    "deepspeed": ("init_distributed",),
    "deepspeed.utils.groups": ("_init_tp_mesh_device",),
    CONFIG: ("get_tensor_parallel_config", "_get_hf_tp_plan"),
    f"{CONFIG}.TPConfig": ("get_partition_config_object",),
    PARTITION: ("AutoTPConfig", "PartitionType"),
    f"{PARTITION}.AutoTPConfig": ("find_matching_spec", "lm_head_patterns"),
    f"{PARTITION}.PartitionType": ("SKIP", "ROW"),
    SPEC: ("shape", "grad_allreduce", "partition_type", "partition_dim", "get_partition_dim", "gather_output"),
    CONVERTER.rpartition(".")[0]: ("TPPlanConverter",),
    CONVERTER: ("convert",),
}


def tensor_parallel_size(content: Mapping[str, Any]) -> int:
    """How many ranks share each layer: the JSON's ``tensor_parallel.autotp_size``; 1 without it.

    Raises:
        UserError: it is no number.
    """
    section = content.get("tensor_parallel") or {}
    size = section.get("autotp_size", 1) if isinstance(section, Mapping) else None
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        raise UserError(
            f'"tensor_parallel" is {json.dumps(section)}: write "tensor_parallel": {{"autotp_size": 2}}, with how many '
            "ranks share each layer"
        )
    return max(1, size)


def check_section(content: Mapping[str, Any]) -> None:
    """Raise a UserError for a "tensor_parallel" section that DeepSpeed would refuse with a traceback."""
    from deepspeed.runtime.tensor_parallel.config import get_tensor_parallel_config  # noqa: PLC0415

    tensor_parallel_size(content)
    try:
        get_tensor_parallel_config(dict(content)).get_partition_config_object()
    except Exception as error:  # pydantic's and ValueErrors
        raise UserError(f'DeepSpeed refuses the section "tensor_parallel": {in_short(error)}') from error


def check_tensor_parallel(config: Any, size: int, processes: int) -> None:
    """Raise a UserError where so many ranks cannot share the processes, or the attention heads of a model.

    Args:
        config: the model's, of transformers; None if it has none.
        size: ranks that share each layer.
        processes: how many there are.
    """
    where = "tensor_parallel.autotp_size"
    check_heads(config, size, where)
    if processes % size:
        raise UserError(f"{where} is {size}, but there are {processes} processes: start a multiple of {size}")


def check_heads(config: Any, size: int, where: str) -> None:
    """Raise a UserError where so many ranks cannot share the attention heads of a model.

    Args:
        config: the model's, of transformers; None if it has none.
        size: ranks that share each layer.
        where: what says that they are so many.
    """
    for key in HEADS:
        heads = getattr(config, key, None)
        if isinstance(heads, int) and heads % size:
            raise UserError(
                f"{where} is {size}, but the model has {key} = {heads}, which so many ranks cannot share: write a "
                f"divisor of {heads}"
            )


def start_tensor_parallel(model: nn.Module, size: int) -> Any:
    """Make DeepSpeed's tensor-parallel groups; collective.

    Args:
        model: its configuration, if it has one, says how many attention heads there are.
        size: ranks that share each layer.

    Returns:
        What ``deepspeed.initialize`` takes as ``mpu``: so told, it counts only ranks with data of their own in
        "train_batch_size".

    Raises:
        UserError: the processes or the model's attention heads cannot be shared by so many.
    """
    import deepspeed  # noqa: PLC0415  (slow to import, and `import megalr` is cheap)
    from deepspeed.utils import groups  # noqa: PLC0415

    deepspeed.init_distributed(verbose=False)
    check_tensor_parallel(getattr(model, "config", None), size, dist.get_world_size())
    groups._init_tp_mesh_device(tensor_model_parallel_size=size)
    return groups


class Plan(NamedTuple):
    """Which layer is cut how.

    Attributes:
        config: DeepSpeed's ``AutoTPConfig``.
        kind: the model's type, which specs may be limited to.
    """

    config: Any
    kind: str | None

    def spec(self, parameter: str) -> Any:
        """DeepSpeed's spec for a parameter of this qualified name, or None."""
        return self.config.find_matching_spec(parameter, self.kind)


def read_plan(model: nn.Module, content: Mapping[str, Any]) -> Plan:
    """The plan of AutoTP, by the JSON's ``tensor_parallel.partition_config`` or preset, else the model's own.

    Args:
        model: not yet cut.
        content: the DeepSpeed JSON.

    Raises:
        UserError: there is neither, or DeepSpeed refuses the model's own.
    """
    from deepspeed.module_inject.autotp_config import AutoTPConfig  # noqa: PLC0415
    from deepspeed.module_inject.tp_plan_converter import TPPlanConverter  # noqa: PLC0415
    from deepspeed.runtime.tensor_parallel.config import _get_hf_tp_plan, get_tensor_parallel_config  # noqa: PLC0415

    config = get_tensor_parallel_config(dict(content)).get_partition_config_object()
    if config is None:
        plan = _get_hf_tp_plan(model)
        if not plan:
            raise UserError(
                "the model comes with no tensor-parallel plan, so nothing says which layers to cut by rows and which "
                'by columns: write "tensor_parallel": {"partition_config": {"layer_specs": [...]}}, as DeepSpeed has it'
            )
        try:
            config = AutoTPConfig(layer_specs=TPPlanConverter.convert(plan))
        except ValueError as error:
            raise UserError(f"DeepSpeed refuses the model's own tensor-parallel plan: {error}") from error
    return Plan(config, getattr(getattr(model, "config", None), "model_type", None))


def planned_cuts(model: nn.Module, content: Mapping[str, Any], factorized: Collection[str] = ()) -> dict[str, Cut]:
    """How AutoTP would cut the weights of the model's modules, by the module's name; of those that it would cut.

    As DeepSpeed has it: by the JSON's ``tensor_parallel.partition_config`` or preset, else by the plan that comes with
    models of transformers.

    Args:
        model: not yet cut.
        content: the DeepSpeed JSON.
        factorized: names of its layers that are parametrized.

    Raises:
        UserError: there is neither, or it asks for something of a factorized layer that only dense ones can do.
    """
    plan = read_plan(model, content)
    found = {name: plan.spec(f"{name}.weight") for name, _ in named_modules(model) if name}
    by_vocabulary = (content.get("tensor_parallel") or {}).get("vocab_parallel_lm_head")
    for name in factorized:
        _check_spec(name, found[name])
        if by_vocabulary and name.rpartition(".")[2] in plan.config.lm_head_patterns:
            raise UserError(
                f'"vocab_parallel_lm_head" needs a dense head, but {name} is factorized: leave {name} out of '
                "megalr.parametrization.target_modules"
            )
    cuts = {name: _cut_of(spec) for name, spec in found.items()}
    return {name: cut for name, cut in cuts.items() if cut is not None}


def check_neighbours(model: nn.Module, cuts: Mapping[str, Cut], factorized: Collection[str]) -> None:
    """Raise a UserError where a factorized layer that is to be cut meets a dense one that every rank has whole.

    AutoTP cuts dense layers; who brings groups of their own cuts them, or has all of a block factorized.

    Args:
        model: parametrized, not yet cut by :func:`~megalr.layers.tensor_parallel.cutting.cut_layers`.
        cuts, factorized: see :func:`planned_cuts`.
    """
    ours = [name for name in factorized if cuts.get(name) in ("rows", "columns")]
    by_parent = {name.rpartition(".")[0]: name for name in ours}
    for name, layer in named_modules(model):
        beside = by_parent.get(name.rpartition(".")[0])
        planned = beside is not None and cuts.get(name) in ("rows", "columns")
        if planned and isinstance(layer, nn.Linear) and not tensor_parallel_cuts({f"{name}.weight": layer.weight}):
            raise UserError(
                f"{beside} is to be cut between the tensor-parallel ranks of mpu=, but every rank has {name} whole, "
                "and their activations do not fit: name it in megalr.parametrization.target_modules, or cut it and "
                "mark its weight with tensor_model_parallel and partition_dim"
            )


def _check_spec(name: str, spec: Any) -> None:
    """Refuse what of DeepSpeed's description of a cut a factorized layer would pass over in silence."""
    if spec is None:
        return
    if spec.shape is not None:
        raise UserError(
            f'"tensor_parallel" gives {name} a "shape", as of fused projections; factorized layers are cut in one '
            "piece of rows or columns: use a model with separate projections"
        )
    if spec.grad_allreduce:
        raise UserError(f'"tensor_parallel" asks for "grad_allreduce" of {name}, which factorized layers cannot do')
    if _cut_of(spec) is None:
        return
    if spec.get_partition_dim() != (1 if _cut_of(spec) == "columns" else 0):
        raise UserError(
            f'"tensor_parallel" gives {name} "partition_dim": {spec.partition_dim}, which is not that of its '
            f'"partition_type": {spec.partition_type.value}: leave it out'
        )


def _cut_of(spec: Any) -> Cut | None:
    from deepspeed.module_inject.autotp_config import PartitionType  # noqa: PLC0415

    if spec is None or spec.partition_type == PartitionType.SKIP:
        return None
    if spec.partition_type == PartitionType.ROW:
        return "columns"
    return "gathered" if spec.gather_output else "rows"
