"""Checks of hyper-parameters, with messages that say what to write."""

from __future__ import annotations

from megalr.errors import UserError


def require_positive(**values: float) -> None:
    """Raise a UserError unless all of the named hyper-parameters are above zero."""
    for key, value in values.items():
        if not value > 0:
            raise UserError(f"optimizer.params.{key} is {value}; write a positive number")


def require_at_least(least: float, **values: float) -> None:
    """Raise a UserError unless all of the named hyper-parameters are at least so large."""
    for key, value in values.items():
        if not value >= least:
            raise UserError(f"optimizer.params.{key} is {value}; write a number of at least {least}")


def require_decay(**values: float) -> None:
    """Raise a UserError unless all of the named hyper-parameters, which weigh the past, lie in [0, 1)."""
    for key, value in values.items():
        if not 0 <= value < 1:
            raise UserError(f"optimizer.params.{key} is {value}; write a number in [0, 1)")
