"""Which host answers: for a parameter, for the groups of an optimizer, for an engine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from megalr.errors import UserError
from megalr.hosts.base import Host, NamedGroup, RunningHost
from megalr.hosts.deepspeed import ENGINE, DeepSpeed, DeepSpeedEngine
from megalr.hosts.deepspeed_pipeline import DeepSpeedPipeline
from megalr.hosts.deepspeed_watch import watch as watch_deepspeed
from megalr.hosts.plain import Plain
from megalr.hosts.zero_layouts import is_in_engine, told_of_parallelism
from megalr.layout.shard import Shard

# What this file reads of DeepSpeed; held by tests/deepspeed/test_contract.py.
INTERNALS = {ENGINE: ("basic_optimizer", "pipeline_parallelism")}

# In the order in which they are asked; an ordinary torch job, the last, takes every parameter.
HOSTS: tuple[Host, ...] = (DeepSpeed(), Plain())


def host_of(engine: Any) -> RunningHost:
    """The host of an engine.

    Args:
        engine: what ``megalr.initialize`` or ``deepspeed.initialize`` returns first.

    Raises:
        UserError: it is no engine that megalr knows.
    """
    if not hasattr(engine, "basic_optimizer"):
        raise UserError(
            f"expected an engine, found a {type(engine).__name__}: give what megalr.initialize or deepspeed.initialize "
            "returns first"
        )
    return DeepSpeedPipeline(engine) if getattr(engine, "pipeline_parallelism", False) else DeepSpeedEngine(engine)


def host_of_parameter(parameter: Tensor) -> Host:
    """The host whose mark a parameter carries; an ordinary torch job for one without."""
    return next(host for host in HOSTS if host.recognizes(parameter))


def host_of_groups(named_groups: Sequence[NamedGroup], param_groups: Sequence[dict[str, Any]]) -> Host:
    """The host that has made an optimizer's groups what they are.

    Args:
        named_groups, param_groups: see :meth:`~megalr.hosts.base.Host.read`.
    """
    parameters = [parameter for named in named_groups for parameter in named.values()]
    given = {id(parameter) for parameter in parameters}
    wrapped = any(id(tensor) not in given for group in param_groups for tensor in group["params"])
    # At stage 0 DeepSpeed leaves no mark: there it matters if it keeps masters, and if it was told of parallelism.
    if wrapped or told_of_parallelism() is not None:
        return HOSTS[0]
    return next(host for host in HOSTS if any(map(host.recognizes, parameters)))


def is_left_out(named_groups: Sequence[NamedGroup], param_groups: Sequence[dict[str, Any]]) -> bool:
    """Whether an engine has cut the parameters for another optimizer: these groups still have them as they were.

    Args:
        named_groups, param_groups: see :meth:`~megalr.hosts.base.Host.read`.
    """
    parameters = [parameter for named in named_groups for parameter in named.values()]
    own = {id(parameter) for parameter in parameters}
    given = [tensor for group in param_groups for tensor in group["params"]]
    return any(map(is_in_engine, parameters)) and any(id(tensor) in own for tensor in given)


def read(named_groups: Sequence[NamedGroup], param_groups: Sequence[dict[str, Any]]) -> tuple[Shard, Shard]:
    """:meth:`~megalr.hosts.base.Host.read` of the host that has made the groups what they are."""
    return host_of_groups(named_groups, param_groups).read(named_groups, param_groups)


def held(parameter: Tensor) -> list[tuple[int, Tensor]]:
    """See :meth:`~megalr.hosts.base.Host.held`."""
    return host_of_parameter(parameter).held(parameter)


def copies(parameter: Tensor) -> list[tuple[int, Tensor]]:
    """See :meth:`~megalr.hosts.base.Host.copies`."""
    return host_of_parameter(parameter).copies(parameter)


def write(parameter: Tensor, values: Tensor) -> None:
    """See :meth:`~megalr.hosts.base.Host.write`."""
    host_of_parameter(parameter).write(parameter, values)


def logical_shape(parameter: Tensor) -> tuple[int, ...]:
    """See :meth:`~megalr.hosts.base.Host.logical_shape`."""
    return host_of_parameter(parameter).logical_shape(parameter)


def is_partitioned(parameter: Tensor) -> bool:
    """See :meth:`~megalr.hosts.base.Host.is_partitioned`."""
    return host_of_parameter(parameter).is_partitioned(parameter)


def is_replicated(parameter: Tensor) -> bool:
    """See :meth:`~megalr.hosts.base.Host.is_replicated`."""
    return host_of_parameter(parameter).is_replicated(parameter)


def gather(parameters: Iterable[Tensor]) -> AbstractContextManager[Any]:
    """See :meth:`~megalr.hosts.base.Host.gather`; parameters of one host."""
    parameters = list(parameters)
    host = next(host for host in HOSTS if any(map(host.recognizes, parameters)) or host is HOSTS[-1])
    return host.gather(parameters)


def watch(optimizer: Any) -> None:
    """Have engines that are given an optimizer of ours, now or later, not do in silence what would be wrong with it.

    May be called again, where no engine had been imported.
    """
    watch_deepspeed(optimizer)


def check_config(config: Any, data_size: int) -> None:
    """See :meth:`~megalr.hosts.base.Host.check`, for the engine that reads the JSON: DeepSpeed."""
    HOSTS[0].check(config, data_size)
