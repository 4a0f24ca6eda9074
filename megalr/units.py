"""Numbers in units that people read."""

from __future__ import annotations

BYTE_UNITS = ("kB", "MB", "GB", "TB", "PB", "EB")
ROUNDS_TO_A_THOUSAND = 999.5  # with three digits


def human_bytes(number: float) -> str:
    """Bytes in decimal units (1 GB is 1e9 bytes, as papers count) with three digits, e.g. ``"7.41 MB"``."""
    if abs(number) < ROUNDS_TO_A_THOUSAND:
        return f"{number:.0f} B"
    value, unit = number / 1000, 0
    while abs(value) >= ROUNDS_TO_A_THOUSAND and unit < len(BYTE_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:#.3g}".rstrip(".") + f" {BYTE_UNITS[unit]}"
