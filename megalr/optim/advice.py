"""Warnings at build time: settings that are valid, but seldom do what they were written for."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cache

from torch import nn

from megalr.agreement import is_first
from megalr.config.settings import MegalrConfig
from megalr.hosts import logical_shape
from megalr.hosts.deepspeed_config import common_rate
from megalr.layers.base import FactorizedLinear, KeepsWeight
from megalr.layers.replacement import replaced_layers
from megalr.optim.groups import ParameterGroup
from megalr.roles import possible_heads
from megalr.schema import Json

logger = logging.getLogger(__name__)

SHOWN = 3  # layers in a message


def advise(model: nn.Module, config: MegalrConfig, groups: Sequence[ParameterGroup], content: Json) -> None:
    """Log a warning for each setting that probably does something else than its author expects.

    Rank 0 logs each message once per process.

    Args:
        model: with its layers replaced, and not yet divided.
        config: the typed JSON.
        groups: of the optimizer.
        content: the JSON as it was read. Without "scheduler" nothing is said of a schedule.
    """
    for message in (*_heads(model, config, groups), *_rates(config, content), *_factors(model)):
        _warn(message)


@cache
def _warn(message: str) -> None:
    if is_first():
        logger.warning(message)


def _heads(model: nn.Module, config: MegalrConfig, groups: Sequence[ParameterGroup]) -> Iterator[str]:
    """A layer that looks like the output head, which the model does not name, and which is treated like any other."""
    by_rule = {name: group.rule for group in groups if group.rule for name in group.parameters}
    replaced = replaced_layers(model)
    for name, embedding in possible_heads(model).items():
        rule = by_rule.get(f"{name}.weight")
        if name in replaced:
            where, others = "megalr.parametrization", [each for each in replaced if each != name]
            found = f"{name} is replaced by a {config.parametrization.type} layer"
            targets = getattr(config.parametrization, "target_modules", ())
        elif rule is not None:
            where = "optimizer.params"
            others = [each.removesuffix(".weight") for each in by_rule if each != f"{name}.weight"]
            found, targets = f"{rule.name} updates {name}", config.optimizer.target_modules
        elif any(value is not None for value in vars(config.optimizer.embedding).values()):
            where, others, targets = "", [], None
            found = f'"embedding" in optimizer.params, which is for embeddings and head, does not apply to {name}'
        else:
            continue
        if isinstance(targets, tuple) and {name, name.rpartition(".")[2]} & set(targets):
            continue  # chosen by its name
        leave = f'write "target_modules": {_targets(name, others)} in {where} to leave it out, or ' if where else ""
        yield (
            f"{name} has as many outputs as {embedding} has rows, so it may be the output head, but the model does not "
            "say so: megalr's head is what the model's get_output_embeddings() returns, or a module called lm_head. "
            f"Therefore {found}. If it is the head, {leave}name it in one of these two ways"
        )


def _targets(head: str, others: Sequence[str]) -> str:
    """Parts of the other layers' names that the head's has not, as JSON."""
    parts = [f"{name.partition('.')[0]}." if "." in name else name for name in others]
    found = [part for part in dict.fromkeys(parts) if part not in f"{head}.weight"]
    return json.dumps(found) if found else "[...]"


def _rates(config: MegalrConfig, content: Json) -> Iterator[str]:
    """Learning rates of the JSON that its schedule writes over."""
    rate = common_rate(content)
    if rate is None:
        return
    key, value, is_default = rate
    optimizer = content.get("optimizer") or content.get("megalr", {}).get("optimizer") or {}
    params = optimizer.get("params") or {}
    given = {"": config.optimizer.lr} if isinstance(params, Mapping) and "lr" in params else {}
    groups = {name: getattr(config.optimizer, name).lr for name in ("adamw", "embedding", "norm")}
    given |= {name: lr for name, lr in groups.items() if lr is not None}
    unused = {name: lr for name, lr in given.items() if not math.isclose(lr, value)}
    if not unused:
        return
    words = [f'"{name}": {{"lr": {lr:g}}}' if name else f'"lr": {lr:g}' for name, lr in unused.items()]
    kind, verb = content["scheduler"]["type"], "are" if len(words) > 1 else "is"
    yield (
        f'scheduler.type "{kind}" sets the learning rate of all groups of parameters from scheduler.params.{key}, '
        f"which is {value:g}{' by default' if is_default else ''}. So {' and '.join(words)} in optimizer.params "
        f"{verb} never used. Write the rate that you want in {key}, or use WarmupCosineLR, "
        "which multiplies each group's own"
    )


def _factors(model: nn.Module) -> Iterator[str]:
    """Layers whose factors take the place of a weight and are larger than it was."""
    larger, limits, total = [], [], 0
    for name, layer in replaced_layers(model).items():
        if not isinstance(layer, FactorizedLinear) or isinstance(layer, KeepsWeight):
            continue  # beside a dense weight nothing is saved at any rank
        total += 1
        m, n, rank = (getattr(layer, key, None) for key in ("out_features", "in_features", "rank"))
        if not (isinstance(m, int) and isinstance(n, int) and isinstance(rank, int)):
            continue  # a user's own
        size = sum(math.prod(logical_shape(getattr(layer, factor))) for factor in layer.factors)
        if size > m * n:
            larger.append(f"{name}: {size:,} elements in place of {m * n:,}")
            limits.append(rank - math.ceil((size - m * n) / (m + n)))
    if not larger:
        return
    shown = ", ".join(larger[:SHOWN]) + (", ..." if len(larger) > SHOWN else "")
    yield (
        f"megalr.parametrization.rank is too large to save memory: the factors of {len(larger)} of {total} replaced "
        f"layers have more elements than the dense weight ({shown}). At a rank of at most "
        f"{max(1, min(limits))} none has; usual is a quarter of the model's width"
    )
