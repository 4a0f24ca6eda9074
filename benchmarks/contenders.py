"""The optimizers that are compared, each built as its own documentation has it, all with the same settings."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.gradients import TARGETS, Workload
from megalr.api import build_optimizer
from megalr.rules.bases import random_basis
from megalr.rules.galore import GaLore

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.timing import Steps

LR = 1e-4  # small enough for weights that stay finite whatever the gradients
SCALE = 0.25
GALORE_TORCH = "pip install --no-deps galore-torch==1.0"


class NotAvailableError(Exception):
    """A contender's package is not installed; the message says how to install it."""


@dataclass(frozen=True)
class Contender:
    """One row of the table.

    Attributes:
        title: its name there.
        build: makes it, for a workload, a rank and a gap between refreshes.
        writes_gradients: whether its step does, so that it needs its own.
    """

    title: str
    build: Callable[[Workload, int, int], Steps]
    writes_gradients: bool = False


class Products:
    """Nothing but a GaLore update's two matrix products for every matrix, into memory that is there already.

    It bounds from below what any implementation of GaLore takes, whatever else it saves.
    """

    def __init__(self, workload: Workload, rank: int, gap: int) -> None:
        """The same sides and ranks as :class:`~megalr.rules.galore.GaLore` would choose."""
        rule = GaLore(rank=rank, update_proj_gap=gap)
        generator = torch.Generator().manual_seed(0)
        self._work: list[tuple[torch.nn.Parameter, bool, Tensor, Tensor, Tensor]] = []
        backs: dict[torch.Size, Tensor] = {}
        for matrix in workload.matrices.values():
            shape = (matrix.shape[0], matrix.shape[1])
            (side,) = rule.sides(shape)
            size = shape[0] if side == "left" else shape[1]
            basis = random_basis(size, rule.rank_of(shape), generator, matrix.device)
            back = backs.setdefault(matrix.shape, torch.empty(shape))
            self._work.append((matrix, side == "left", basis, torch.empty(rule.low_shape(shape)), back))

    @torch.no_grad()
    def step(self) -> None:
        """R = Pᵀ G and P R, or R = G Q and R Qᵀ, for every matrix."""
        for matrix, left, basis, low, back in self._work:
            assert matrix.grad is not None
            if left:
                torch.mm(basis.T, matrix.grad, out=low)
                torch.mm(basis, low, out=back)
            else:
                torch.mm(matrix.grad, basis, out=low)
                torch.mm(low, basis.T, out=back)


def _adamw(**options: Any) -> Callable[[Workload, int, int], Steps]:
    def build(workload: Workload, rank: int, gap: int) -> Steps:
        return torch.optim.AdamW(workload.model.parameters(), lr=LR, weight_decay=0.0, **options)

    return build


def _ours(kind: str, **params: Any) -> Callable[[Workload, int, int], Steps]:
    def build(workload: Workload, rank: int, gap: int) -> Steps:
        projected = {} if kind == "Muon" else {"rank": rank, "update_proj_gap": gap}
        section = {"lr": LR, "target_modules": list(TARGETS), **projected, **params}
        return build_optimizer(workload.model, {"optimizer": {"type": kind, "params": section}})

    return build


def _galore_torch(workload: Workload, rank: int, gap: int) -> Steps:
    if importlib.util.find_spec("galore_torch") is None:
        raise NotAvailableError(f"not installed: {GALORE_TORCH}")
    with _without_bitsandbytes():
        kind = importlib.import_module("galore_torch").GaLoreAdamW
    projection = {"rank": rank, "update_proj_gap": gap, "scale": SCALE, "proj_type": "std"}
    groups = [
        {"params": list(workload.rest.values())},
        {"params": list(workload.matrices.values()), **projection},
    ]
    optimizer: Steps = kind(groups, lr=LR, no_deprecation_warning=True)
    return optimizer


@contextmanager
def _without_bitsandbytes() -> Iterator[None]:
    """Let galore-torch be imported where bitsandbytes is missing, of which only its 8-bit optimizer makes use."""
    missing = importlib.util.find_spec("bitsandbytes") is None
    names = ["bitsandbytes", "bitsandbytes.optim", "bitsandbytes.optim.optimizer"] if missing else []
    for name in names:
        sys.modules[name] = types.ModuleType(name)
    if missing:
        vars(sys.modules["bitsandbytes.optim.optimizer"])["Optimizer2State"] = torch.optim.Optimizer
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


def _deepspeed_muon(workload: Workload, rank: int, gap: int) -> Steps:
    """The class that DeepSpeed's engine builds for "type": "Muon"; at stage 0 its own ``step`` runs the rule.

    The engine's choice for everything but matrices is an Adam that has to be compiled; torch's fused AdamW, which is
    what ours uses, stands in for it, so that what differs is Muon. Its iteration is compiled by torch, too: once
    for each shape, here, so that no timed step holds a compilation.
    """
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam
    from deepspeed.runtime.zero.muon.original_muon import muon_update

    for shape in sorted({tuple(p.shape) for p in workload.matrices.values()}):
        with torch.no_grad():
            muon_update(torch.randn(shape), torch.zeros(shape), beta=0.95, ns_method="gram", is_expert_group=False)
    groups = [
        {"params": list(workload.matrices.values()), "use_muon": True, "lr": LR, "momentum": 0.95},
        {"params": list(workload.rest.values()), "use_muon": False, "lr": LR, "eps": 1e-8, "betas": (0.9, 0.999)},
    ]
    optimizer: Steps = MuonWithAuxAdam(groups, adam_optimizer=torch.optim.AdamW, adam_optimizer_kwargs={"fused": True})
    return optimizer


CONTENDERS = {
    "adamw": Contender("torch AdamW", _adamw()),
    "adamw-fused": Contender("torch AdamW, fused", _adamw(fused=True)),
    "galore-torch": Contender("galore-torch GaLoreAdamW", _galore_torch),
    "galore-svd": Contender("megalr GaLoreAdamW, svd", _ours("GaLoreAdamW", projector="svd", scale=SCALE)),
    "galore-power": Contender("megalr GaLoreAdamW, power", _ours("GaLoreAdamW", projector="power", scale=SCALE)),
    "fira": Contender("megalr FiraAdamW", _ours("FiraAdamW", scale=SCALE)),
    "apollo": Contender("megalr APOLLO", _ours("APOLLO")),
    "products": Contender("GaLore's matrix products alone", Products),
    "deepspeed-muon": Contender("DeepSpeed Muon", _deepspeed_muon, writes_gradients=True),
    "muon": Contender("megalr Muon", _ours("Muon")),
}
# Those of a block exist side by side; a block is freed before the next is built, which bounds the memory.
BLOCKS = {
    "projected rules": (
        "adamw",
        "adamw-fused",
        "galore-torch",
        "galore-svd",
        "galore-power",
        "fira",
        "apollo",
        "products",
    ),
    "Muon": ("adamw-fused", "deepspeed-muon", "muon"),
}
