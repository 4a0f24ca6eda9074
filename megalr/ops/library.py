"""The compiled ops' schemas, and the one place that chooses what runs them.

Every op is declared here once, in the namespace ``torch.ops.megalr``, with a torch reference for every device and a
fake implementation, so that it can be called, traced and tested where nothing is compiled. :func:`load` adds the
compiled kernels of csrc/, which then take precedence on their device.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from megalr.ops import build
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
_HOMES = {name: "megalr.ops.reference" for name in SCHEMAS} | {"refactorize": "megalr.ops.refactorize"}


@dataclass(frozen=True)
class Kernels:
    """What runs the ops on one kind of device.

    Attributes:
        library: the compiled library that is loaded, or None: the torch reference runs.
        why: where the library came from, or why there is none.
    """

    library: str | None
    why: str


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


def op(name: str, device: torch.device) -> Callable[..., Any]:
    """``torch.ops.megalr.<name>``, after the kernels of the device are loaded."""
    if device.type not in _loaded:  # no more than this in a step
        load(device.type)
    overload: Callable[..., Any] = getattr(torch.ops.megalr, name).default
    return overload


def _load(device_type: str) -> Kernels:
    wish = os.environ.get("MEGALR_OPS", "auto")
    if wish not in {"auto", "compiled", "torch"}:
        raise ValueError(f"MEGALR_OPS={wish}: write auto, compiled or torch")
    if wish == "torch":
        return Kernels(None, "MEGALR_OPS=torch")
    if device_type not in build.LIBRARIES:
        return Kernels(None, f"there are no kernels for {device_type} tensors")
    if device_type == "cuda":
        load("cpu")  # holds what ATen computes on any device
    try:
        library = build.find(device_type)
        if library is None or not _loads(library):
            library = build.build(device_type, broken=library)
            torch.ops.load_library(str(library.path))
    except (build.BuildError, OSError) as error:
        if wish == "compiled":
            raise
        if os.environ.get("RANK", "0") == "0":
            logger.warning("the ops run as torch calls on %s tensors, more slowly: %s", device_type, error)
        return Kernels(None, str(error))
    return Kernels(str(library.path), library.origin)


def _loads(library: Library) -> bool:
    try:
        torch.ops.load_library(str(library.path))
    except OSError as error:
        logger.warning("%s does not load and is compiled again: %s", library.path, error)
        return False
    return True


def _from_home(name: str, kind: str) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module(_HOMES[name]), f"{name}_{kind}")(*args, **kwargs)

    return call


_library = torch.library.Library("megalr", "DEF")  # lives as long as the process: its end would take the ops away
for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema)
    _library.impl(_name, _from_home(_name, "reference"), "CompositeExplicitAutograd")
    torch.library.register_fake(f"megalr::{_name}", _from_home(_name, "fake"), lib=_library)
