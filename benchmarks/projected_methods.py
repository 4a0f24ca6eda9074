"""The ways of training that the benchmark of projected layers compares, as sections of the JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.gradients import TARGETS
from megalr.api import parametrize
from megalr.config.settings import MegalrConfig
from megalr.optim.groups import ParameterGroup, parameter_groups

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

LR = 1e-4  # small enough for weights that stay finite on random tokens
# One for all: its products with thin matrices alone are what ranks exchange, and what a refresh costs is not an SVD.
PROJECTOR = "power"
TITLES = {
    "adamw": "full-rank AdamW",
    "galore": "GaLoreAdamW rule",
    "input": "projected, input",
    "shared": "projected, input, shared basis",
    "kept": "projected, input, shared basis, W kept",
    "std": "projected, std",
}
COUNTED = ("adamw", "galore", "input", "shared")
PROJECTED = {
    "input": {"side": "input", "share_basis": False},
    "shared": {"side": "input", "share_basis": True},
    "kept": {"side": "input", "share_basis": True, "compute": "materialized"},
    "std": {"side": "std", "share_basis": False},
}
# Groups of parameters that hold what is not embedding, head or norm; a model has one of them.
MATRIX_GROUPS = ("trunk", "matrices", "projected")


def configuration(method: str, rank: int, gap: int) -> dict[str, Any]:
    """The JSON's two sections for one of :data:`TITLES`.

    Args:
        method: its key.
        rank: r.
        gap: updates between two refreshes of a matrix's basis.
    """
    projection = {"rank": rank, "update_proj_gap": gap, "projector": PROJECTOR, "target_modules": list(TARGETS)}
    if method == "galore":
        return {"optimizer": {"type": "GaLoreAdamW", "params": {"lr": LR, "scale": 0.25, **projection}}}
    section: dict[str, Any] = {"optimizer": {"type": "AdamW", "params": {"lr": LR, "weight_decay": 0.0}}}
    if method in PROJECTED:
        section["megalr"] = {"parametrization": {"type": "projected", **PROJECTED[method], **projection}}
    return section


def prepare(model: LlamaForCausalLM, method: str, rank: int, gap: int) -> tuple[MegalrConfig, list[ParameterGroup]]:
    """Parametrize a model, which may be on the meta device, in place; its configuration and parameter groups."""
    section = configuration(method, rank, gap)
    parametrize(model, section)
    config = MegalrConfig.from_json(section)
    return config, parameter_groups(model, config.optimizer)
