"""Notice a parametrized model that another optimizer than megalr's trains.

Such an optimizer trains factors as it would any weight, so nothing fails: refactorizations, refreshes and merges just
never happen. A :class:`Watch` waits for the first gradient of the model's parameters and raises if nobody has built
megalr's optimizer by then, or if an engine was given another one. After that gradient no hook is left.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from megalr import hosts
from megalr.config.guards import GuardsConfig
from megalr.config.settings import MegalrConfig
from megalr.errors import UserError
from megalr.optim.events.registry import has_events
from megalr.schema import Json

if TYPE_CHECKING:
    from megalr.optim.optimizer import MegalrOptimizer

SECTIONS = ("refactorization", "momentum_reset", "activations")


def needs(config: MegalrConfig, content: Json) -> tuple[str, ...]:
    """The keys of the JSON that mean nothing under another optimizer than megalr's.

    Args:
        config: the typed JSON.
        content: the same as it was read.
    """
    found = ["megalr.parametrization"] if has_events(config.parametrization) else []
    found += [f"megalr.{key}" for key in SECTIONS if getattr(config, key) is not None]
    if config.guards != GuardsConfig():
        found.append("megalr.guards")
    if "optimizer" in content.get("megalr", {}):
        found.append("megalr.optimizer")
    elif config.optimizer.rule is not None:
        found.append("optimizer")
    return tuple(found)


def watch(model: nn.Module, keys: tuple[str, ...]) -> None:
    """From now on, notice a first backward pass without megalr's optimizer.

    Args:
        model: parametrized.
        keys: of :func:`needs`; without any there is nothing to notice.
    """
    unwatch(model)
    if not keys:
        return
    watching = Watch(keys)
    for module in model.modules():
        if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
            module.register_forward_pre_hook(watching.before_forward)
            watching.arm(module)


def unwatch(model: nn.Module) -> None:
    """Take back what :func:`watch` did: another optimizer may train the model."""
    for module in model.modules():
        for key, _ in _found(module._forward_pre_hooks):
            del module._forward_pre_hooks[key]
        for parameter in module.parameters(recurse=False):
            hooks: Any = parameter._backward_hooks
            for key, _ in _found(hooks):
                del hooks[key]


def attend(model: nn.Module, optimizer: MegalrOptimizer) -> None:
    """Tell who watches the model that this optimizer is to train it."""
    for module in model.modules():
        for _, watching in _found(module._forward_pre_hooks):
            watching.attend(model, optimizer)


class Watch:
    """Waits for the first gradient of a model's parameters.

    A forward pre-hook puts hooks on parameters, because those are lost where parameters are exchanged for others: in
    copies of the model, by ``to_empty()``, under FSDP. A compiled model keeps the hooks of its first parameters.
    """

    def __init__(self, keys: tuple[str, ...]) -> None:
        """
        Args:
            keys: of :func:`needs`.
        """
        self._keys = keys
        self._model: weakref.ref[nn.Module] | None = None
        self._optimizer: weakref.ref[MegalrOptimizer] | None = None

    def __reduce__(self) -> tuple[type[Watch], tuple[tuple[str, ...]]]:
        """A copy of the model waits for an optimizer of its own."""
        return Watch, (self._keys,)

    def attend(self, model: nn.Module, optimizer: MegalrOptimizer) -> None:
        """See :func:`attend`."""
        self._model, self._optimizer = weakref.ref(model), weakref.ref(optimizer)

    def before_forward(self, module: nn.Module, _: Any) -> None:
        """A forward pre-hook."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        self.arm(module)

    def arm(self, module: nn.Module) -> None:
        """Put a hook on each parameter that is trained and has none."""
        for parameter in module.parameters(recurse=False):
            if parameter.requires_grad and not any(w is self for _, w in _found(parameter._backward_hooks)):
                parameter.register_hook(self.on_gradient)

    def on_gradient(self, _: Tensor) -> None:
        """A hook of a parameter.

        Raises:
            UserError: another optimizer is to use this gradient.
        """
        optimizer = None if self._optimizer is None else self._optimizer()
        if optimizer is None or _is_left_out(optimizer):
            keys = ", ".join(self._keys)
            raise UserError(
                f"the configuration has {keys}, which only megalr's optimizer carries out, and this backward pass is "
                "for another optimizer, or for none: train with megalr.initialize(model=model, config=config); or "
                "deepspeed.initialize(optimizer=megalr.build_optimizer(model, config), ...); or "
                "transformers.Trainer(optimizer_cls_and_kwargs=megalr.trainer_optimizer(args)). To train without, "
                f"remove {keys}, or call megalr.parametrize(model, config, other_optimizer=True)"
            )
        model = None if self._model is None else self._model()
        if model is not None:
            unwatch(model)


def _is_left_out(optimizer: MegalrOptimizer) -> bool:
    return hosts.is_left_out([group.parameters for group in optimizer.groups], optimizer.all_groups)


def _found(hooks: Any) -> Iterator[tuple[int, Watch]]:
    """The hooks that are a watch's, by the keys that torch has given them; a list, so that they can be removed."""
    items = list((hooks or {}).items())
    return ((key, hook.__self__) for key, hook in items if isinstance(getattr(hook, "__self__", None), Watch))
