"""Exchange a model's linear layers, chosen by name, for another parametrization of their weights."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from megalr.config import FullConfig, LowRankConfig, ParametrizationConfig
from megalr.errors import UserError
from megalr.layers.low_rank import LowRankLinear, kaiming_uniform_, variance_matched_


def parametrize(model: nn.Module, config: ParametrizationConfig, *, seed: int = 0) -> nn.Module:
    """Replace every ``nn.Linear`` that ``config.target_modules`` names, in place, and return the model.

    Works on real tensors and on the meta device (where nothing is initialised). Each dense weight is freed as soon as
    its factors exist, so that the peak is the dense model's size.

    Args:
        model: any module; its layers keep their qualified names, ``x.weight`` becomes ``x.B`` and ``x.A``.
        config: the "parametrization" section.
        seed: key of the factors' random start.

    Raises:
        UserError: a pattern matches nothing, a rank exceeds a matrix, a weight is shared, or the model was
            partitioned by ``deepspeed.zero.Init`` before.
    """
    if isinstance(config, FullConfig):
        return model
    targets = _targets(model, config)
    for name, layer in targets.items():
        smaller = min(layer.out_features, layer.in_features)
        if config.rank > smaller:
            raise UserError(
                f"megalr.parametrization.rank is {config.rank}, but {name} is a {layer.out_features} x "
                f"{layer.in_features} matrix: write a rank of at most {smaller}, or leave it out of target_modules"
            )
    for name, layer in targets.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, _low_rank(layer, config, seed, name))
    return model


def factor_pairs(model: nn.Module) -> Iterator[tuple[str, str]]:
    """The qualified names of every low-rank pair of the model, as (B, A)."""
    for name, module in model.named_modules():
        if isinstance(module, LowRankLinear):
            prefix = f"{name}." if name else ""
            yield f"{prefix}B", f"{prefix}A"


def matching(names: Iterable[str], patterns: tuple[str, ...] | str, where: str, what: str) -> set[str]:
    """The names that ``target_modules`` chooses, in the way of transformers.

    Args:
        names: qualified names.
        patterns: substrings, of which one has to occur; or one regular expression for the whole name.
        where: the key in the JSON, for messages.
        what: what the names are of, for messages.

    Raises:
        UserError: a pattern matches nothing, or is no regular expression.
    """
    names = list(names)
    if isinstance(patterns, str):
        try:
            expression = re.compile(patterns)
        except re.error as error:
            raise UserError(f"{where} is not a valid regular expression: {patterns!r} ({error})") from error
        chosen = {name for name in names if expression.fullmatch(name)}
        unmatched = [] if chosen else [patterns]
    else:
        chosen = {name for name in names if any(p in name for p in patterns)}
        unmatched = [p for p in patterns if not any(p in name for name in names)]
    if unmatched:
        some = ", ".join(names[:4]) or "none"
        hint = " (a single string is a regular expression for the whole name; use a list for substrings)"
        raise UserError(
            f"{where}: {unmatched[0]!r} matches no {what}{hint if isinstance(patterns, str) else ''}; "
            f"the model has: {some}{', ...' if len(names) > 4 else ''}"
        )
    return chosen


def _targets(model: nn.Module, config: LowRankConfig) -> dict[str, nn.Linear]:
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    names = matching(linear, config.target_modules, "megalr.parametrization.target_modules", "linear layer")
    chosen = {name: layer for name, layer in linear.items() if name in names}
    _refuse_shared(model, chosen)
    return chosen


def _refuse_shared(model: nn.Module, chosen: dict[str, nn.Linear]) -> None:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for name, layer in chosen.items():
        if hasattr(layer.weight, "ds_id"):
            raise UserError(
                "the model was built under deepspeed.zero.Init, which has already cut its weights: build it without, "
                "call megalr.parametrize, then deepspeed.initialize, which shards the factors (with transformers' "
                "Trainer: before TrainingArguments are made)"
            )
        if len(names[id(layer.weight)]) > 1:
            shared = " and ".join(names[id(layer.weight)])
            raise UserError(
                f"{shared} are one shared weight, which cannot be factorised: leave {name} out of target_modules"
            )


def _low_rank(layer: nn.Linear, config: LowRankConfig, seed: int, name: str) -> LowRankLinear:
    weight = layer.weight
    new = LowRankLinear(
        layer.in_features,
        layer.out_features,
        config.rank,
        scale=config.scale,
        bias=layer.bias,
        device=weight.device,
        dtype=weight.dtype,
    ).train(layer.training)
    if weight.is_meta:
        return new
    if config.init == "variance_matched":
        # Root mean square rather than the configuration's nominal value: it is right for any model and any start.
        dense_std = torch.linalg.vector_norm(weight.detach(), dtype=torch.float32).item() / weight.numel() ** 0.5
        if dense_std == 0:
            raise UserError(f"{name}.weight is all zeros, so there is no variance to match: initialise the model first")
        variance_matched_(new, dense_std, seed, name)
    else:
        kaiming_uniform_(new, seed, name)
    return new
