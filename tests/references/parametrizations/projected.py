"""Projected layers: GaLore as a layer, W = W0 + R Qᵀ or W0 + P R. The reference is tests/plain_projected.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from tests.equality import CLIPPING, Case, without_reference
from tests.odd_model import odd_model
from tests.plain_projected import plain_projected
from tests.references.parametrizations.common import ADAMW, LAYERS
from tests.small_llama import small_llama


def projected(model: Callable[[], nn.Module] = odd_model, *, clip: float = CLIPPING, **section: Any) -> Case:
    """Layers each of whose bases is refreshed at least twice in twelve updates; ``section`` is the JSON's."""
    layers = {"rank": 4, "target_modules": ["attn", "mlp"]} if model is small_llama else LAYERS
    given = {"type": "projected", "update_proj_gap": 5, **layers, **section}

    def plain(model: nn.Module, data: Sequence[Tensor], clip: float) -> dict[str, Tensor]:
        return plain_projected(model, data, given, ADAMW, clip=clip or math.inf)

    return Case({"type": "AdamW", "params": ADAMW}, {"parametrization": given}, plain, model, clip=clip)


CASES = {
    "projected": projected(),
    "projected, std": projected(side="std"),
    "projected, shared": projected(small_llama, share_basis=True),
}
SETTINGS = {
    "projected, std, all at once": projected(side="std", stagger=False),
    "projected, output": projected(side="output"),
    "projected, transport": projected(moments="transport"),
    "projected, reset": projected(moments="reset"),
    "projected, random": projected(projector="random", moments="transport"),
    "projected, random from the sixth update": projected(random_from=6, moments="transport_first"),
    "projected, materialized": projected(compute="materialized"),
    "projected, rematerialized": projected(compute="rematerialized"),
    "projected, low-rank": projected(compute="low_rank"),
    "projected, eigh": projected(projector="eigh"),
    "projected, randomized": projected(projector="randomized"),
    "projected, power": without_reference(projected(projector="power")),  # whose basis is another than the SVD's
    "projected, not shared": projected(small_llama, share_basis=False),
    "projected, no clipping": projected(clip=0.0),
}
