"""Random numbers keyed by what they are for, so that no result depends on an order of calls, a rank or a world size."""

from __future__ import annotations

import hashlib

import torch


def generator(seed: int, *keys: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator that depends on ``seed`` and ``keys`` alone.

    Args:
        seed: the run's seed.
        keys: what the numbers are for, e.g. a parameter's qualified name and a refresh count.
        device: where the generator draws; the CPU's stream is the same on every machine.
    """
    return torch.Generator(device=device).manual_seed(seed_for(seed, *keys))


def seed_for(seed: int, *keys: str | int) -> int:
    """A 63-bit seed from the SHA-256 of ``seed`` and ``keys``."""
    digest = hashlib.sha256(repr((seed, *keys)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
