"""Which generation of weights a model has: what layers keep from one call to the next is of one of them."""

from __future__ import annotations

_generation = 0


def generation() -> int:
    """A number that is another one after each update and each load, of any model in this process."""
    return _generation


def next_generation() -> None:
    """Weights have changed."""
    global _generation  # noqa: PLW0603  (layers and optimizers know nothing of each other)
    _generation += 1
