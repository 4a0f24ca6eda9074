"""One plain PyTorch process that trains layers with factors in the place of weights, as their papers write them.

The layers are those of tests/references/parametrizations/, each a module of a few lines that forms its whole weight
where it has one; autograd does the rest. Only the start of the factors comes from megalr. Nothing is of its layers'
passes or its optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import megalr
from tests.references import reference_for
from tests.references.common import Adam
from tests.references.parametrizations import PLAIN
from tests.references.parametrizations.common import Plain


class ByRule(Adam):
    """Another rule's direction, from its reference, in the place of Adam's."""

    def __init__(self, reference: Any) -> None:
        self.reference = reference

    def direction(self, g: Tensor) -> Tensor:
        return self.reference.update(g)

    def reset(self) -> None:
        self.reference.reset()


def plain_factors(
    model: nn.Module,
    data: Sequence[Tensor],
    section: dict[str, Any],
    params: dict[str, Any],
    *,
    clip: float,
    rule: tuple[str, Mapping[str, Any]] | None = None,
) -> dict[str, Tensor]:
    """Train in place; the weights by name, those of replaced layers as :meth:`Plain.exported` gives them.

    Args:
        model: dense, with a loss in what it returns.
        data: token ids of each update, (sequences, length).
        section: the JSON's ``megalr.parametrization``, and "restarts".
        params: the JSON's ``optimizer.params``.
        clip: the largest norm of all gradients together.
        rule: on what the layers train and on other linear layers but the head, its type and settings, where that is
            not AdamW.
    """
    layers = _replace(model, section)
    ours = {f"{name}.{key}" for name, layer in layers.items() for key in layer.trained}
    weights = {n: w for n, w in model.named_parameters() if w.requires_grad}
    warmup = section.get("restarts", {}).get("warmup", section.get("restart_warmup_steps"))
    adams = {n: Adam(params.get("betas", (0.9, 0.999)), params.get("eps", 1e-8)) for n in weights}
    if rule is not None:
        linear = {f"{n}.weight" for n, module in model.named_modules() if isinstance(module, nn.Linear)}
        for name in ours | linear - {"lm_head.weight"}:
            adams[name] = ByRule(reference_for(rule[0], weights[name].shape, rule[1], seed=0, name=name, phase=0))
    since: dict[str, int | None] = {"factors": None, "dense": None}
    for t, ids in enumerate(data, start=1):
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        grads = {n: torch.zeros_like(w) if w.grad is None else w.grad for n, w in weights.items()}
        norm = math.sqrt(sum(g.double().square().sum().item() for g in grads.values()))
        grads = {n: g * min(1.0, clip / (norm + 1e-6)) for n, g in grads.items()}
        ramp = {k: 1.0 if n is None else 0.001 + 0.999 * min(1.0, n / warmup) for k, n in since.items()}
        since = {k: None if n is None else n + 1 for k, n in since.items()}
        with torch.no_grad():
            for name in weights.keys() - ours:
                settings = dict(params)
                if "embed" in name or "lm_head" in name:
                    settings |= params.get("embedding", {})
                elif weights[name].ndim < 2:
                    settings |= {"weight_decay": 0.0}
                decay, lr = settings.get("weight_decay", 0.0), settings["lr"] * ramp["dense"]
                weights[name] -= lr * (adams[name].direction(grads[name]) + decay * weights[name])
            for name, layer in layers.items():
                own = {key: adams[f"{name}.{key}"] for key in layer.trained}
                mine = {key: grads[f"{name}.{key}"] for key in layer.trained}
                layer.step(mine, own, params["lr"] * ramp["factors"], params.get("weight_decay", 0.0), t)
                if restarted := layer.end_update(t, own):
                    since["factors"] = 0
                    if restarted == "all":
                        since["dense"] = 0
                        for other in weights.keys() - ours:
                            adams[other].reset()
    result = {n: w.detach().clone() for n, w in model.named_parameters() if n not in ours}
    for name, layer in layers.items():
        result |= {f"{name}.{key}": w.detach() for key, w in layer.exported().items()}
    return result


def _replace(model: nn.Module, section: dict[str, Any]) -> dict[str, Plain]:
    """Our plain layers in the place of megalr's, starting as they do."""
    given = {key: value for key, value in section.items() if key != "restarts"}
    dense = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    megalr.parametrize(model, {"megalr": {"parametrization": given}}, other_optimizer=True)
    layers: dict[str, Plain] = {}
    for name in sorted(dense):
        module = model.get_submodule(name)
        if isinstance(module, nn.Linear):
            continue
        start = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        parent, _, child = name.rpartition(".")
        layers[name] = PLAIN[section["type"]](name, start, section)
        setattr(model.get_submodule(parent), child, layers[name])
    return layers
