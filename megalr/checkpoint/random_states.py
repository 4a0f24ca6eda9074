"""A process's random states as a tensor: the bytes of JSON."""

from __future__ import annotations

import json
import random

import numpy as np
import torch
from torch import Tensor

from megalr.checkpoint.inputs import parse


def random_states() -> Tensor:
    """Of Python, numpy, torch and this process's GPU: uint8, one dimension."""
    version, numbers, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state()
    state = {
        "python": [version, list(numbers), gauss],
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
        "torch": _text(torch.get_rng_state()),
        "cuda": _text(torch.cuda.get_rng_state()) if torch.cuda.is_available() else None,
    }
    return torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)


def set_random_states(saved: Tensor) -> None:
    """Take over what :func:`random_states` gave; of a GPU where there is one now.

    Raises:
        ValueError, TypeError, KeyError: it is something else.
    """
    state = parse(bytes(saved.tolist()))
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    try:
        torch.set_rng_state(_bytes(state["torch"]))
        if state["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(_bytes(state["cuda"]))
    except RuntimeError as error:  # of another length
        raise ValueError(f"the state of torch's random numbers is none: {error}") from error


def _text(state: Tensor) -> str:
    return state.numpy().tobytes().hex()


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
