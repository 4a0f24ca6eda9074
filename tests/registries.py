"""Registries as they were: what a test registers, and files that it has loaded as plugins, are forgotten after it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megalr.layers.registry import PARAMETRIZATIONS
from megalr.optim.events.registry import EVENTS
from megalr.rules.registry import RULES


@contextmanager
def forgotten() -> Iterator[None]:
    """A block after which no method is known that was not before."""
    registries: tuple[dict[str, Any], ...] = (RULES, PARAMETRIZATIONS, EVENTS)
    before, modules = [dict(registry) for registry in registries], set(sys.modules)
    try:
        yield
    finally:
        for registry, entries in zip(registries, before, strict=True):
            registry.clear()
            registry.update(entries)
        for name in set(sys.modules) - modules:
            if name.startswith("megalr_plugin_"):
                del sys.modules[name]
