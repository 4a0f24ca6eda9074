"""Axes: which values they span, where a value lies on them, and which ticks they have."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megalr.formatting import human_bytes

Floats = NDArray[np.float64]

STEPS = (1, 2, 5, 10)
LARGEST = 1e300  # end of an axis: twice as much, and room beside it, is a float
LARGEST_EXPONENT = 700.0  # the largest loss whose perplexity is a float
UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class Axis:
    """An axis from ``low`` to ``high``.

    Attributes:
        low, high: of the values, low < high; above 0 where ``log``.
        log: whether it is logarithmic.
        form: how numbers are written: a key of :data:`FORMS`.
    """

    low: float
    high: float
    log: bool = False
    form: str = "short"

    def place(self, values: Floats) -> Floats:
        """Where values lie: 0 at ``low``, 1 at ``high``; NaN for what has no place on a logarithmic axis."""
        if not self.log:
            return (values - self.low) / (self.high - self.low)
        with np.errstate(invalid="ignore", divide="ignore"):
            logs = np.log(np.where(values > 0, values, np.nan))
        return np.asarray((logs - math.log(self.low)) / (math.log(self.high) - math.log(self.low)))

    def ticks(self, about: int = 5) -> list[float]:
        """Round values from ``low`` to ``high``."""
        found = log_ticks(self.low, self.high, about) if self.log else even_ticks(self.low, self.high, about)
        return [tick for tick in found if tick == round(tick)] if self.form == "whole" else found

    def write(self, value: float) -> str:
        """A value as this axis writes it."""
        return short_perplexity(value) if self.form == "perplexity" else FORMS[self.form](value)


def span(values: Iterable[Floats], *, log: bool = False, form: str = "short", zero: bool = False) -> Axis:
    """An axis on which all finite values lie, with a little room above and below.

    Args:
        values: arrays of any size; on a logarithmic axis, what is not positive counts for nothing.
        log, form: the axis's.
        zero: whether an even axis begins at 0, if no value lies below.
    """
    found = np.concatenate([np.asarray(each, dtype=np.float64).ravel() for each in values] or [np.zeros(0)])
    found = found[np.isfinite(found)]
    found = found[found > 0] if log else found
    low, high = (float(found.min()), float(found.max())) if len(found) else (1.0, 1.0)
    if log:
        room = max((math.log(high) - math.log(low)) * 0.05, 0.05)
        low, high = math.log(low) - room, math.log(high) + room
        return Axis(math.exp(max(low, -LARGEST_EXPONENT)), math.exp(min(high, LARGEST_EXPONENT)), True, form)
    low, high = max(low, -LARGEST), min(high, LARGEST)
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return Axis(0.0 if zero and low >= 0 else low - room, high + room, False, form)


def even_ticks(low: float, high: float, about: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / max(about, 1)
    if not math.isfinite(rough) or rough <= 0:
        return []
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(each * power for each in STEPS if each * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)] if last - first < 100 else []


def log_ticks(low: float, high: float, about: int) -> list[float]:
    """1, 2 or 5 times powers of ten, or powers alone where those are many; even ticks within half a decade."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    stride = max(1, math.ceil(len(decades) / (about + 2)))
    for digits in ((1,), (1, 3), (1, 2, 5)):
        found = [d * 10.0**decade for decade in decades[::stride] for d in digits]
        found = [tick for tick in found if low <= tick <= high]
        if len(found) >= min(about, 3):
            return found
    return [tick for tick in even_ticks(low, high, about) if tick > 0]


def short(value: float) -> str:
    """A number in few characters: 1.2M, 0.05, 3e-05."""
    for unit, name in UNITS:
        if unit * 0.9995 <= abs(value) < 1e15:
            return f"{value / unit:.4g}{name}"
    return "0" if abs(value) < 1e-300 else f"{value:.4g}"


def perplexity(value: float) -> str:
    """A perplexity, with two decimals where they say something."""
    if not math.isfinite(value) or value >= 1e7:
        return f"{value:.4g}"
    return f"{value:,.2f}" if value < 999.995 else f"{value:,.0f}"


def short_perplexity(value: float) -> str:
    """A perplexity beside a tick, which is round."""
    return f"{value:,.6g}" if value < 1e7 else perplexity(value)


def seconds(value: float) -> str:
    """A time with its unit."""
    if value == 0:
        return "0"
    if abs(value) < 1e-3:
        return f"{value * 1e6:.3g} µs"
    return f"{value * 1e3:.3g} ms" if abs(value) < 1 else f"{value:.4g} s"


FORMS: dict[str, Callable[[float], str]] = {
    "short": short,
    "whole": lambda value: f"{value:,.0f}",
    "bytes": human_bytes,
    "percent": lambda value: f"{100 * value:.3g} %",
    "seconds": seconds,
    "perplexity": perplexity,
}
