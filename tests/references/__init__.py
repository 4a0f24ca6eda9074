"""Every rule a second time, for one matrix, written from the paper: to be read against it, not to be fast.

Nothing here comes from megalr.rules. ``Reference(shape, **hyperparameters).step(W, G, lr, weight_decay)`` updates W in
place, in fp32 or fp64. Random matrices are handed in, so that they can be those that megalr draws.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megalr.discovery import declared_classes
from megalr.seeding import generator
from tests.references.common import Draw, Reference

# The references of this package's modules, by the name that the JSON's "optimizer": {"type": ...} gives them.
REFERENCES: dict[str, type[Reference]] = dict(
    sorted(declared_classes(sys.modules[__name__], Reference, "type_name"), key=lambda found: found[0].lower())
)
# The rules with options of their own, and the titles of these.
OPTIONS = [(name, title) for name, cls in REFERENCES.items() for title in vars(cls).get("options", {})]


def reference_for(
    type_name: str,
    shape: tuple[int, int],
    params: Mapping[str, Any],
    *,
    seed: int,
    name: str,
    phase: int,
    names: Sequence[str] = (),
) -> Reference:
    """The reference of one matrix under a JSON's ``optimizer``.

    Args:
        type_name: ``optimizer.type``.
        shape: of the matrix.
        params: ``optimizer.params``; what is not of the rule (lr, weight_decay, target_modules, ...) is passed over,
            and so is "stagger", of which ``phase`` is the outcome.
        seed, name: the run's seed and the matrix's name, the keys of its random numbers.
        names: of all matrices, for rules in which they take turns.
        phase: the remainder of the updates by the gap at which the matrix refreshes.
    """
    cls = REFERENCES[type_name]
    known = hyperparameters(cls)
    given = {key: value for key, value in params.items() if key in known}
    if "draw" in known:
        given |= {"phase": phase, "draw": drawing(seed, name)}
    if "permutation" in known:
        given["permutation"] = permuting(seed, cls.permutation_key or name)
    if "names" in known:
        given |= {"name": name, "names": names or (name,)}
    return cls(shape, **given)


def drawing(seed: int, name: str) -> Draw:
    """The random matrices of a run, keyed as megalr keys them."""

    def draw(refresh_count: int, side: str, rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator(seed, name, side, refresh_count))

    return draw


def permuting(seed: int, *keys: str) -> Callable[..., Tensor]:
    """The random permutations of a run, keyed as megalr keys them: (count, what for, length) -> indices."""

    def permutation(count: int, what: str, length: int) -> Tensor:
        return torch.randperm(length, generator=generator(seed, *keys, what, count))

    return permutation


def hyperparameters(cls: type[Reference]) -> dict[str, Any]:
    """The keyword arguments of a reference and their defaults, those that it passes on to its base included."""
    found: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        if "__init__" not in vars(base):
            continue
        parameters = inspect.signature(base.__init__).parameters.values()
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            found = {}
        found |= {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    return found
