"""Names of a model's modules and tensors as the user's own classes have them, whatever wraps the model or parts of it.

``torch.compile``, activation checkpointing, FSDP and DistributedDataParallel put a module into another one, so that its
tensors get names like ``_orig_mod.layers.0.weight``. Seeds, patterns, optimizers and checkpoints go by names, and a
run is the same run with and without such a wrapper. Everything that names something of a model asks here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import Tensor, nn

# Attributes under which torch's wrappers keep the module that they wrap: of torch.compile, FSDP, checkpoint_wrapper.
WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def unwrapped(module: nn.Module) -> nn.Module:
    """The user's module in a wrapper, or the module itself."""
    inner = _inner(module)
    return module if inner is None else unwrapped(module.get_submodule(inner))


def has_compiled(model: nn.Module) -> bool:
    """Whether torch.compile has wrapped the model or a part of it; ``module.compile()`` wraps nothing."""
    return any("_orig_mod" in module._modules for module in model.modules())


def plain_name(model: nn.Module, name: str) -> str:
    """The name of a module or tensor without the parts that wrappers add.

    Args:
        model: that the name is of.
        name: qualified, as torch gives it.
    """
    module: nn.Module | None = model
    kept = []
    for part in name.split("."):
        if module is None or part != _inner(module):
            kept.append(part)
        module = None if module is None else module._modules.get(part)
    return ".".join(kept)


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """``model.named_modules()`` by plain names, wrappers left out."""
    return ((plain_name(model, name), module) for name, module in model.named_modules() if _inner(module) is None)


def named_parameters(model: nn.Module, *, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
    """``model.named_parameters()`` by plain names."""
    found = model.named_parameters(remove_duplicate=remove_duplicate)
    return ((plain_name(model, name), parameter) for name, parameter in found)


def named_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """``model.named_buffers()`` by plain names."""
    return ((plain_name(model, name), buffer) for name, buffer in model.named_buffers())


def submodule(model: nn.Module, name: str) -> nn.Module:
    """The user's module of a plain name; the model itself for an empty one."""
    module = unwrapped(model)
    for part in name.split(".") if name else ():
        module = unwrapped(module.get_submodule(part))
    return module


def without_wrappers(text: str) -> str:
    """Text with plain names in the place of those that :data:`WRAPPED` is in."""
    return re.sub(rf"\b(?:{'|'.join(WRAPPED)})\.", "", text)


def _inner(module: nn.Module) -> str | None:
    """The attribute under which a wrapper keeps what it wraps; None for a user's module."""
    if isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
        return "module"
    return next((name for name in WRAPPED if name in module._modules), None)
