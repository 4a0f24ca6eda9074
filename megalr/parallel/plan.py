"""What DeepSpeed's "tensor_parallel" section asks for: how many ranks, their groups, and which layer is cut how."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

import torch.distributed as dist
from torch import nn

from megalr.errors import UserError

Cut = Literal["rows", "columns"]  # of the weight: column-parallel and row-parallel in Megatron-LM's words
HEADS = ("num_attention_heads", "num_key_value_heads")


def tensor_parallel_size(content: Mapping[str, Any]) -> int:
    """How many ranks share each layer: the JSON's ``tensor_parallel.autotp_size``; 1 without it.

    Raises:
        UserError: it is no number.
    """
    section = content.get("tensor_parallel") or {}
    size = section.get("autotp_size", 1) if isinstance(section, Mapping) else None
    if not isinstance(size, int) or size < 0:
        raise UserError(
            f'"tensor_parallel" is {json.dumps(section)}: write "tensor_parallel": {{"autotp_size": 2}}, with how many '
            "ranks share each layer"
        )
    return max(1, size)


def check_tensor_parallel(config: Any, size: int, processes: int) -> None:
    """Raise a UserError where so many ranks cannot share the processes, or the attention heads of a model.

    Args:
        config: the model's, of transformers; None if it has none.
        size: ranks that share each layer.
        processes: how many there are.
    """
    where = "tensor_parallel.autotp_size"
    for key in HEADS:
        heads = getattr(config, key, None)
        if isinstance(heads, int) and heads % size:
            raise UserError(
                f"{where} is {size}, but the model has {key} = {heads}, which so many ranks cannot share: write a "
                f"divisor of {heads}"
            )
    if processes % size:
        raise UserError(f"{where} is {size}, but there are {processes} processes: start a multiple of {size}")


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


def planned_cuts(model: nn.Module, content: Mapping[str, Any]) -> dict[str, Cut]:
    """How AutoTP would cut the weights of the model's modules, by the module's name; of those that it would cut.

    As DeepSpeed has it: by the JSON's ``tensor_parallel.partition_config`` or preset, else by the plan that comes with
    models of transformers.

    Raises:
        UserError: there is neither.
    """
    from deepspeed.module_inject.autotp_config import AutoTPConfig, PartitionType  # noqa: PLC0415
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
        config = AutoTPConfig(layer_specs=TPPlanConverter.convert(plan))
    kind = getattr(getattr(model, "config", None), "model_type", None)
    words: dict[Any, Cut] = {PartitionType.COLUMN: "rows", PartitionType.ROW: "columns"}
    found = {name: config.find_matching_spec(f"{name}.weight", kind) for name, _ in model.named_modules() if name}
    return {name: words[spec.partition_type] for name, spec in found.items() if spec and spec.partition_type in words}
