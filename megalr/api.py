"""The three ways in.

:func:`initialize` from the JSON, :func:`build_optimizer` for a job that calls DeepSpeed itself, and
:func:`trainer_optimizer` for transformers' Trainer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalr.agreement import agree, is_first
from megalr.config.guards import GuardsConfig
from megalr.config.settings import FullConfig, Json, MegalrConfig, fill_auto, read_json
from megalr.errors import UserError
from megalr.guards.guard import attach_guard
from megalr.hosts import gather, host_of, logical_shape
from megalr.hosts.autotp import (
    check_heads,
    check_neighbours,
    planned_cuts,
    start_tensor_parallel,
    tensor_parallel_size,
)
from megalr.hosts.deepspeed import refuse_experts, refuse_scalars
from megalr.hosts.deepspeed_config import check_deepspeed_config, refuse_compiled, refuse_unsupported
from megalr.hosts.deepspeed_pipeline import check_pipeline, check_rules, check_stages, has_stages
from megalr.hosts.deepspeed_start import check_arguments, join_before_engine, start_engine
from megalr.hosts.partial_gradients import partial_gradients, pass_over_frozen, sum_gradients
from megalr.hosts.tensor_parallel import (
    check_earlier_groups,
    indices_in_whole,
    is_marked,
    mark_gradients,
    ranks_that_share,
    tensor_parallel_group,
    whole_frozen,
)
from megalr.layers import parametrize as _parametrize
from megalr.layers.replacement import check_made_by, check_whole, forget_reads, replaced_layers
from megalr.layers.tensor_parallel.cutting import cut_layers
from megalr.layers.velora import compress_activations, compressed_layers
from megalr.naming import named_buffers, named_parameters, plain_name
from megalr.optim.advice import advise
from megalr.optim.events.refactorization import refactorized_pairs
from megalr.optim.events.registry import layer_events
from megalr.optim.events.velora import Directions
from megalr.optim.facts import facts_of
from megalr.optim.foreign import attend, needs, watch
from megalr.optim.groups import check_names, parameter_groups, refuse_complex
from megalr.optim.optimizer import MegalrOptimizer

logger = logging.getLogger(__name__)

UNSHARED = "compressed activations cannot be shared by tensor-parallel ranks: remove megalr.activations"


def parametrize(model: nn.Module, config: Json | str | Path, *, other_optimizer: bool = False) -> nn.Module:
    """Replace linear layers of a model as the "megalr" section of the JSON says, in place.

    With an "activations" section, the layers that it names compress the activations that they save. If the JSON asks
    for anything that only megalr's optimizer does, such as refactorizations, and another optimizer is used, the first
    backward pass raises a UserError.

    Args:
        model: a dense model, not yet partitioned by DeepSpeed.
        config: the DeepSpeed JSON, as a path or a dictionary.
        other_optimizer: allow any optimizer; what only megalr's does is then left out.

    Returns:
        The model.

    Raises:
        UserError: the JSON is not valid, or does not fit the model.
    """
    _check_model(model)
    content = fill_auto(read_json(config), None)
    parsed = MegalrConfig.from_json(content)
    _parametrize(model, parsed.parametrization, seed=parsed.seed)
    if parsed.activations is not None:
        compress_activations(model, parsed.activations)
    watch(model, () if other_optimizer else needs(parsed, content))
    return model


def build_optimizer(model: nn.Module, config: Json | str | Path, training_args: Any | None = None) -> MegalrOptimizer:
    """Build the optimizer that the JSON asks for, to be passed to ``deepspeed.initialize(optimizer=...)``.

    The JSON needs ``"zero_allow_untested_optimizer": true``, and with CPU offload
    ``"zero_force_ds_cpu_optimizer": false``.

    Args:
        model: the model after :func:`parametrize`. A dense model may be partitioned by ``deepspeed.zero.Init``.
        config: the DeepSpeed JSON, as a path or a dictionary.
        training_args: transformers' ``TrainingArguments``, from which "auto" for lr, betas, eps and weight_decay is
            read. Their DeepSpeed configuration is completed in place.

    Raises:
        UserError: for a configuration that cannot work.
    """
    _check_model(model)
    content = read_json(config)
    if training_args is not None:
        content = fill_auto(content, training_args)
        _complete(training_args, content)
    refuse_unsupported(content)
    refuse_experts(dict(named_parameters(model)))
    refuse_compiled(model, content)
    size = tensor_parallel_size(content)
    if size > 1 and replaced_layers(model):
        raise UserError(
            "tensor_parallel.autotp_size cuts dense layers only, and the model has factorized ones, which "
            "megalr.initialize cuts: call that in place of megalr.parametrize, megalr.build_optimizer and "
            "deepspeed.initialize, or remove megalr.parametrization"
        )
    if size > 1 and compressed_layers(model):
        raise UserError(UNSHARED)
    optimizer = _build_optimizer(model, content)
    if size > 1 or any(map(is_marked, model.parameters())):
        mark_gradients(model.parameters(), content)
    if size > 1:
        pass_over_frozen(model.parameters())
    optimizer.agree_first(facts_of(model, content))
    advise(model, optimizer.config, optimizer.groups, content)
    return optimizer


def _build_optimizer(model: nn.Module, content: Json) -> MegalrOptimizer:
    """:func:`build_optimizer` for a configuration that is complete, whoever cuts the layers."""
    parsed = MegalrConfig.from_json(content)
    check_whole(model)
    check_pipeline(model, tensor_parallel_size(content), guarded=parsed.guards != GuardsConfig())
    layers = replaced_layers(model)
    if not layers and not isinstance(parsed.parametrization, FullConfig):
        raise UserError(
            f'the configuration asks for parametrization "{parsed.parametrization.type}", but the model has no such '
            "layer: call megalr.parametrize(model, config) before megalr.build_optimizer"
        )
    check_made_by(model, parsed.parametrization)
    groups = parameter_groups(model, parsed.optimizer)
    check_rules(model, {n: (g.rule, p) for g in groups if g.rule for n, p in g.parameters.items()})
    check_stages(model, content, len(groups))
    compressed = compressed_layers(model)
    if parsed.activations is not None and not compressed:
        raise UserError(
            "the configuration asks for compressed activations, but the model has no such layer: call "
            "megalr.parametrize(model, config) before megalr.build_optimizer"
        )
    optimizer = MegalrOptimizer(
        groups,
        parsed,
        pairs=refactorized_pairs(model, parsed),
        events=layer_events(parsed.parametrization, layers, parsed.seed),
        activations=Directions(compressed) if compressed else None,
        sections={key: content[key] for key in ("optimizer", "megalr") if key in content},
        model=model,
    )
    attend(model, optimizer)
    return optimizer


def trainer_optimizer(training_args: Any) -> tuple[Callable[[], Any], dict[str, Any]]:
    """Return the argument of ``transformers.Trainer(optimizer_cls_and_kwargs=...)``, for a job with ``--deepspeed``.

    Do not use ``Trainer(optimizers=(...))``: with DeepSpeed, transformers silently drops that optimizer and builds its
    own. The Trainer calls the result of this function when it needs its optimizer.

    Args:
        training_args: transformers' ``TrainingArguments``, with ``deepspeed`` set to a JSON whose "megalr" section
            holds the optimizer.

    Raises:
        UserError: there is no such JSON, or its "optimizer" section is not inside of "megalr".
    """
    config = getattr(training_args, "deepspeed", None)
    if config is None:
        raise UserError("TrainingArguments have no deepspeed configuration: write deepspeed=, or --deepspeed ds.json")
    content = read_json(config)
    if "optimizer" in content:
        raise UserError(
            'transformers has DeepSpeed build what the JSON\'s "optimizer" names: move the section into "megalr", '
            'as in "megalr": {"optimizer": {"type": ...}}'
        )
    refuse_unsupported(content)
    MegalrConfig.from_json(fill_auto(content, training_args))
    return lambda: build_optimizer, {"config": content, "training_args": training_args}


def initialize(model: nn.Module, config: Json | str | Path, **kwargs: Any) -> tuple[Any, Any, Any, Any]:
    """Call ``deepspeed.initialize`` for a dense model and a JSON with a "megalr" section.

    This replaces layers in place, builds the optimizer and passes both to DeepSpeed. A DeepSpeed schedule starts at its
    first iteration, one update earlier than with ``deepspeed.initialize``, which makes the first update before it. Rank
    0 logs at INFO what is trained by what, as ``optimizer.summary()``.

    Args:
        model: a dense model, the same on every rank.
        config: the DeepSpeed JSON, as a path or a dictionary; not modified.
        **kwargs: passed to ``deepspeed.initialize``, e.g. ``training_data``, or ``lr_scheduler``, a function of the
            optimizer. ``model_parameters`` may be the model's parameters, all or all with ``requires_grad``, which are
            trained anyway.

    Returns:
        ``(engine, optimizer, dataloader, scheduler)``, as ``deepspeed.initialize``. The
        :class:`~megalr.optim.MegalrOptimizer` itself is ``engine.basic_optimizer``. The
        :class:`~megalr.guards.guard.Guard` is ``engine.megalr_guard``; a pipeline engine has none.

    Raises:
        UserError: the configuration cannot work, or ranks have different ones; raised before anything is built.
    """
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    check_arguments(model, kwargs)
    join_before_engine(kwargs)
    content = _read_together(model, config)
    check_deepspeed_config(content, _data_size(model, content, kwargs))
    parameters = dict(named_parameters(model))
    refuse_experts(parameters)
    refuse_scalars(parameters)
    refuse_complex(parameters)
    refuse_compiled(model, content)
    check_earlier_groups(max(tensor_parallel_size(content), ranks_that_share(kwargs.get("mpu"))))
    parametrize(model, content)
    optimizer = _build_optimizer(model, content)
    scheduled = content if "lr_scheduler" not in kwargs else {**content, "scheduler": None}  # which then is not used
    advise(model, optimizer.config, optimizer.groups, scheduled)
    _cut(model, content, kwargs)
    results = start_engine(model, optimizer, content, **kwargs)
    optimizer.prepare()
    forget_reads(model)  # which tensor parallelism has made
    if is_first():
        logger.info("megalr trains\n%s", optimizer.summary())
    if not host_of(results[0]).has_stages:
        attach_guard(results[0])
    return results


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise UserError(
            f"model is {model if isinstance(model, type) else f'a {type(model).__name__}'}: give the torch.nn.Module "
            "to train"
        )


def _read_together(model: nn.Module, config: Json | str | Path) -> dict[str, Any]:
    """Read the JSON, and make sure that all ranks have the same, and the same code and model. Collective.

    First of all, since a rank that refused something alone would leave the others waiting.
    """
    try:
        _check_model(model)
        content = read_json(config)
    except UserError as error:
        agree({"the configuration": str(error)})
        raise
    agree({"the configuration": "can be read", **facts_of(model, content)})
    return content


def _data_size(model: nn.Module, content: Json, kwargs: dict[str, Any]) -> int | None:
    """How many processes have data of their own; None where DeepSpeed has yet to be told or to join them."""
    elsewhere = ("mpu", "mesh_param", "dist_init_required", "distributed_port")
    if has_stages(model) or content.get("sequence_parallel_size") or any(name in kwargs for name in elsewhere):
        return None
    size, shared = dist.get_world_size() if dist.is_initialized() else 1, tensor_parallel_size(content)
    return size // shared if size % shared == 0 else None


def _cut(model: nn.Module, content: Json, kwargs: dict[str, Any]) -> None:
    """Share the model's factorized layers between tensor-parallel ranks; DeepSpeed's AutoTP shares the dense ones."""
    size, mpu = tensor_parallel_size(content), kwargs.get("mpu")
    if size > 1:
        if mpu is not None:
            raise UserError("tensor_parallel.autotp_size makes the groups that mpu= brings: give one of the two")
        mpu = kwargs["mpu"] = start_tensor_parallel(model, size)
        pass_over_frozen(model.parameters())
    ranks = ranks_that_share(mpu)
    if ranks == 1:
        return
    mark_gradients(model.parameters(), content)
    if compressed_layers(model):
        raise UserError(UNSHARED)
    factorized = replaced_layers(model)
    if factorized:
        cuts = planned_cuts(model, content, factorized)
        if size == 1:
            check_heads(getattr(model, "config", None), ranks, "the number of mpu='s tensor-parallel ranks")
            check_neighbours(model, cuts, factorized)
        group = tensor_parallel_group(mpu)
        cut_layers(model, MegalrConfig.from_json(content).parametrization, cuts, group)
        if size == 1:  # else AutoTP does it
            sum_gradients(partial_gradients(model, content, cuts, factorized).values(), group)


def _complete(training_args: Any, content: Json) -> None:
    """Put what is needed into the configuration that transformers and accelerate will hand to DeepSpeed, in place."""
    live = getattr(getattr(training_args, "hf_deepspeed_config", None), "config", None)
    if live is None:
        return
    if "megalr" in content:
        live["megalr"] = content["megalr"]  # accelerate refuses an "auto" that it does not know, in any section
    # With offload accelerate would exchange the optimizer for DeepSpeed's CPU Adam.
    live["zero_force_ds_cpu_optimizer"] = False


def consolidated_state_dict(engine: Any) -> dict[str, Tensor] | None:
    """Gather the weights of the model as whole tensors, at any ZeRO stage. Collective.

    Trained parameters come from the fp32 masters. Frozen parameters and persistent buffers are returned as they are. A
    parameter that layers share is returned under each of its names, as one tensor.

    Args:
        engine: of ``megalr.initialize``, or DeepSpeed's with ``megalr.build_optimizer``.

    Returns:
        On rank 0 the tensors on the CPU, by qualified name; None on other ranks.

    Raises:
        UserError: on all ranks: weights of the model were written without :func:`megalr.adopt_weights`, or the
            optimizer was built for another module.
    """
    host = host_of(engine)
    optimizer: MegalrOptimizer = host.optimizer
    check_names(optimizer.groups, host.module)
    optimizer.check_model()
    state, module = optimizer.consolidate(), host.module
    trained = optimizer.prepare().layout.shapes
    for name, parameter in named_parameters(module):
        places = indices_in_whole(parameter)
        if places is not None and state is not None:
            state[name] = torch.empty_like(state[name]).index_copy_(0, places, state[name])
    # Layers may share a parameter, and each has its own name for it.
    first = {id(parameter): name for name, parameter in named_parameters(module)}
    for name, parameter in named_parameters(module, remove_duplicate=False):
        if name in trained:
            continue
        if first[id(parameter)] in trained:
            if state is not None:
                state[name] = state[first[id(parameter)]]
        elif not parameter.requires_grad or 0 in logical_shape(parameter):
            with gather([parameter]):
                whole = whole_frozen(name, parameter)
                if state is not None:
                    state[name] = whole
    if state is not None:
        persistent = {name for name in (plain_name(module, each) for each in module.state_dict()) if name not in state}
        state.update({n: b.detach().cpu().clone() for n, b in named_buffers(module) if n in persistent})
    return state
