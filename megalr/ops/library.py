"""The compiled ops' schemas, and the one place that chooses what runs them.

Every op is declared here once, in the namespace ``torch.ops.megalr``, with a torch reference for every device and a
fake implementation, so that it can be called, traced and tested where nothing is compiled. :func:`load` adds the
compiled kernels of csrc/, which then take precedence on their device.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megalr.errors import UserError
from megalr.ops import apex, build, checks
from megalr.ops.build import Library

logger = logging.getLogger(__name__)

SCHEMAS = {
    "momentum_reset": "(Tensor(a!)[] tensors) -> ()",
    "low_rank_adam": """(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs,
        int[] steps, float lr, float beta1, float beta2, float eps, float weight_decay, bool reset) -> ()""",
    "projected_adam": """(Tensor(a!)[] directions, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs,
        int[] steps, float beta1, float beta2, float eps, float scale) -> ()""",
    "stable_spam_adam": """(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs,
        Tensor(d!) statistics, int[] clip_steps, float[] bias1, float[] bias2, float lr, float beta1, float beta2,
        float eps, float weight_decay, float gamma1, float gamma2, float theta, float norm_eps) -> ()""",
    "refactorize": "(Tensor(a!)[] B, Tensor(b!)[] A, Tensor(c!)[] moments, str moment_mode) -> Tensor",
}

# Where each op's "<name>_reference" and "<name>_fake" are; imported when first called.
_HOMES = {name: "megalr.ops.reference" for name in SCHEMAS} | {"refactorize": "megalr.ops.refactorization"}

# What ATen computes is in the CPU's library, for every device.
_IN_LIBRARY = {"cpu": set(SCHEMAS), "cuda": set(SCHEMAS) - {"refactorize"}}


@dataclass(frozen=True)
class Kernels:
    """What runs the ops on one kind of device.

    Attributes:
        library: the compiled library that is loaded, or None: the torch reference runs.
        why: where the library came from, or why there is none.
        instead: what is called in an op's place, with its arguments.
    """

    library: str | None
    why: str
    instead: Mapping[str, Callable[..., Any]] = field(default_factory=dict)


_loaded: dict[str, Kernels] = {}


def load(device_type: str) -> Kernels:
    """Load the compiled kernels of a kind of device, once in a process, and say what runs the ops there.

    ``MEGALR_OPS`` is ``auto`` (the default: compiled where it can be had, else the torch reference, which is said
    once), ``compiled`` (an error where it cannot be had) or ``torch``.

    Args:
        device_type: "cpu", "cuda", as in ``tensor.device.type``.

    Raises:
        ValueError: MEGALR_OPS is something else.
        BuildError: MEGALR_OPS=compiled and there is no compiler, or it failed; with its output's end.
        OSError: MEGALR_OPS=compiled and what was compiled does not load.
    """
    if device_type not in _loaded:
        _loaded[device_type] = _load(device_type)
    return _loaded[device_type]


def run(name: str, *arguments: Any) -> Any:
    """Call an op by what was chosen for the device of its tensors.

    Args:
        name: a key of :data:`SCHEMAS`.
        arguments: all of its schema, in order.

    Raises:
        ValueError: an argument does not fit; the message says which, and what to write.
    """
    tensors = (x for argument in arguments if isinstance(argument, list | tuple) for x in argument)
    device = next((x.device for x in tensors if isinstance(x, Tensor)), None)
    overload: Callable[..., Any] = getattr(torch.ops.megalr, name).default
    call = load(device.type).instead.get(name, overload) if device else overload  # no more than this in a step
    try:
        return call(*arguments)
    except (RuntimeError, TypeError, AttributeError):
        # torch says no more of a None among the gradients than that it expected something else.
        for i, argument in enumerate(getattr(torch.ops.megalr, name).default._schema.arguments):
            if "Tensor" in str(argument.type):
                checks.check_tensors(name, argument.name, arguments[i])
        raise


def reference(name: str) -> Callable[..., Any]:
    """An op's checks and then its torch reference, as what runs where nothing is compiled."""

    def call(*arguments: Any) -> Any:
        _from_home(name, "fake")(*arguments)
        lists: dict[bool, dict[str, Any]] = {True: {}, False: {}}
        for argument, value in zip(getattr(torch.ops.megalr, name).default._schema.arguments, arguments, strict=True):
            if "Tensor" in str(argument.type):
                written = argument.alias_info is not None and argument.alias_info.is_write
                lists[written][argument.name] = [value] if isinstance(value, Tensor) else value
        checks.check_apart(name, written=lists[True], read=lists[False])
        return _from_home(name, "reference")(*arguments)

    return call


def runs_from(name: str, device_type: str) -> str:
    """What runs an op on a kind of device now: "compiled", "torch calls", or one of them beside "apex"."""
    chosen = "compiled" if _is_compiled(name, device_type) else "torch calls"
    loaded = _loaded.get(device_type)
    return f"apex, {chosen}" if loaded and name in loaded.instead else chosen


def _load(device_type: str) -> Kernels:
    wish = os.environ.get("MEGALR_OPS", "auto")
    if wish not in {"auto", "compiled", "torch"}:
        raise UserError(f"MEGALR_OPS={wish}: write auto, compiled or torch")
    if wish == "torch":
        return Kernels(None, "MEGALR_OPS=torch")
    if device_type not in build.LIBRARIES:
        return Kernels(None, f"there are no kernels for {device_type} tensors")
    if device_type == "cuda":
        load("cpu")  # holds what ATen computes on any device
    # apex has the usual AdamW for what is all fp32, without a reset; the rest is left to the op.
    instead = {"low_rank_adam": apex.low_rank_adam} if device_type == "cuda" and apex.kernels() else {}
    try:
        library = _first_that_loads(device_type)
    except (build.BuildError, OSError) as error:
        if wish == "compiled":
            raise
        if os.environ.get("RANK", "0") == "0":
            logger.warning("the ops run as torch calls on %s tensors, more slowly: %s", device_type, error)
        return Kernels(None, str(error), instead)
    return Kernels(str(library.path), library.origin, instead)


def _first_that_loads(device_type: str) -> Library:
    """Of those that are found, else one that is compiled now."""
    broken = []
    for library in build.find(device_type):
        try:
            _load_one(library, device_type)
        except OSError as error:
            logger.warning("%s does not load and is compiled again: %s", library.path, error)
            broken.append(library)
        else:
            return library
    library = build.build(device_type, broken=broken)
    _load_one(library, device_type)
    return library


def _load_one(library: Library, device_type: str) -> None:
    """Raises OSError: it cannot be loaded, or it can and has not these ops."""
    torch.ops.load_library(str(library.path))
    absent = sorted(name for name in _IN_LIBRARY[device_type] if not _is_compiled(name, device_type))
    if absent:
        raise OSError(f"there is no megalr::{absent[0]} for {device_type} tensors in it")


def _is_compiled(name: str, device_type: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"megalr::{name}", device_type.upper())


def _from_home(name: str, kind: str) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module(_HOMES[name]), f"{name}_{kind}")(*args, **kwargs)

    return call


_library = torch.library.Library("megalr", "DEF")  # lives as long as the process: its end would take the ops away
for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema)
    _library.impl(_name, reference(_name), "CompositeExplicitAutograd")
    torch.library.register_fake(f"megalr::{_name}", _from_home(_name, "fake"), lib=_library)
