"""Parameters that every tensor-parallel rank has whole, and of whose gradient each computes a part.

Such as Qwen3's q_norm, whose weight every rank uses on its own heads. Tensor-parallel plans say which they are.
DeepSpeed sums their gradients where its AutoTP runs, which is not so with an ``mpu``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from megalr.hosts.autotp import SPEC, Cut, read_plan
from megalr.hosts.tensor_parallel import is_marked
from megalr.naming import named_modules

REGISTERED = "_ds_grad_allreduce_registered"  # AutoTP's note that somebody sums the gradient
SUMMED = "a parameter whose gradient AutoTP sums"

# What this file reads and writes of DeepSpeed; held by tests/deepspeed/test_contract.py.
INTERNALS = {SUMMED: (REGISTERED,), SPEC: ("grad_allreduce",)}


def partial_gradients(
    model: nn.Module, content: Mapping[str, Any], cuts: Mapping[str, Cut], factorized: Collection[str]
) -> dict[str, nn.Parameter]:
    """The whole, trained parameters of whose gradient each rank has a part, beside factorized layers that are cut.

    Those whose "grad_allreduce" the plan asks for, and their modules' other parameters, which see the same part of the
    heads. Beside dense layers alone they belong to who cuts these.

    Args:
        model: parametrized.
        content, factorized: see :func:`~megalr.hosts.autotp.planned_cuts`.
        cuts: what that returns.

    Returns:
        By qualified name, in the order of the model, which is the same on every rank.
    """
    plan = read_plan(model, content)
    found: dict[str, nn.Parameter] = {}
    for name, module in named_modules(model):
        if name in factorized:
            continue
        for own, parameter in module.named_parameters(prefix=name, recurse=False):
            asked = any(spec is not None and spec.grad_allreduce for spec in map(plan.spec, (own, f"{name}.weight")))
            whole = parameter.requires_grad and not is_marked(parameter)
            if asked and whole and _beside_cut(name, cuts, factorized):
                found[own] = parameter
    return found


def sum_gradients(parameters: Iterable[nn.Parameter], group: dist.ProcessGroup) -> None:
    """From now on, sum the gradient of each parameter over the tensor-parallel ranks, in every backward pass.

    When it has been computed, before it is accumulated and before ZeRO reduces it: so at every stage, and for any
    number of micro-batches. A parameter of which AutoTP or this function sums it already is left alone.

    Args:
        parameters: trained, the same ones in the same order on every rank.
        group: the tensor-parallel ranks.
    """
    for parameter in parameters:
        if not getattr(parameter, REGISTERED, False):
            parameter.register_hook(lambda grad: _summed(grad, group))
            setattr(parameter, REGISTERED, True)


def pass_over_frozen(parameters: Iterable[nn.Parameter]) -> None:
    """Have AutoTP sum no gradients of frozen parameters, which have none; it ends in a RuntimeError of torch there."""
    for parameter in parameters:
        if not parameter.requires_grad:
            setattr(parameter, REGISTERED, True)


def _beside_cut(name: str, cuts: Mapping[str, Cut], factorized: Collection[str]) -> bool:
    """Whether a factorized layer is cut in the innermost block around a module in which the plan cuts any."""
    while name:
        inside = [each for each in cuts if each.startswith(f"{name}.") and cuts[each] in ("rows", "columns")]
        if inside:
            return any(each in factorized for each in inside)
        name = name.rpartition(".")[0]
    return False


def _summed(grad: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = grad.detach().clone().contiguous()  # autograd may use its own gradient elsewhere
    dist.all_reduce(total, group=group)
    return total
