"""Low-rank layers, and the refactorization and momentum reset of arXiv 2505.22922."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from megalr import parametrize
from megalr.config.settings import MegalrConfig
from megalr.layers import densify
from tests.equality import Case
from tests.odd_model import layered_model
from tests.reference import Recipe, Reference
from tests.references import REFERENCES, hyperparameters
from tests.references.parametrizations.common import Adams, Plain
from tests.small_llama import small_llama


class LowRank(Plain):
    """W = s B A, with the refactorization and reset of arXiv 2505.22922 where the section "restarts" asks for them."""

    type_name = "low_rank"
    trained = ("B", "A")

    def product(self) -> Tensor:
        return self.s * self.B @ self.A

    def dense(self) -> Tensor:
        return self.product()

    def end_update(self, t: int, adams: Adams) -> bool | str:
        every = self.section.get("restarts", {}).get("refactorize_every")
        if every and t % every == 0:
            U, S, Vh = torch.linalg.svd((self.B @ self.A).double(), full_matrices=False)
            root = S[: self.r].sqrt()
            self.B.copy_(U[:, : self.r] * root)
            self.A.copy_(root[:, None] * Vh[: self.r])
            for key in self.trained:
                adams[key].reset()
        return super().end_update(t, adams)


ADAMW = {"lr": 3e-3, "weight_decay": 0.1, "embedding": {"lr": 1e-2}}
MEGALR = {
    "parametrization": {"type": "low_rank", "rank": 5, "alpha": 10},
    "refactorization": {"interval": 7, "moments": "reset"},
    "momentum_reset": {"interval": 9, "scope": "factors", "warmup_steps": 4},
}
UPDATES = 20  # with two refactorizations and two momentum resets in them


def low_rank(
    model: Callable[[], nn.Module] = layered_model,
    rule: str = "AdamW",
    *,
    scope: str = "factors",
    moments: str = "reset",
) -> Case:
    """A model all of whose linear layers but the head are low-rank; the reference is tests/reference.py.

    Args:
        model: makes the dense one.
        rule: what trains the factors.
        scope: of the momentum reset.
        moments: what a refactorization makes of them; but for "reset" AdamW's depend on the signs of singular vectors,
            which no theory fixes, so that there is no reference.
    """
    settings = dict(REFERENCES[rule].on_factors or {})
    # A rule's own betas and epsilon serve what it does not train as well.
    known = hyperparameters(REFERENCES[rule]) | settings
    adam = {key: known[key] for key in ("betas", "eps") if key in known}
    megalr = {
        **MEGALR,
        "refactorization": {**MEGALR["refactorization"], "moments": moments},
        "momentum_reset": {**MEGALR["momentum_reset"], "scope": scope},
    }

    def plain(model: nn.Module, data: Sequence[Tensor], clip: float) -> dict[str, Tensor]:
        parametrize(model, {"megalr": MEGALR}, other_optimizer=True)
        rates = {"lr": settings.get("lr", ADAMW["lr"]), "embedding_lr": ADAMW["embedding"]["lr"]}
        recipe = Recipe(
            **{key: functools.partial(_constant, rate) for key, rate in rates.items()},
            **adam,
            weight_decay=ADAMW["weight_decay"],
            clip=clip,
            refactorize_every=megalr["refactorization"]["interval"],
            refactorization_resets=moments == "reset",
            refactorization_transports=moments == "transport",
            reset_every=megalr["momentum_reset"]["interval"],
            reset_all=scope == "all",
            ramp_steps=megalr["momentum_reset"]["warmup_steps"],
            rule=None if rule == "AdamW" else (rule, {k: v for k, v in settings.items() if k != "lr"}),
        )
        reference = Reference(model, recipe)
        for ids in data:
            reference.step([ids])
        weights = {n: p.detach() for n, p in model.named_parameters()}
        return densify(weights, MegalrConfig.from_json({"megalr": MEGALR}).parametrization)

    optimizer = {"type": rule, "params": {**ADAMW, **settings}}
    has_reference = moments == "reset" or (moments == "transport" and rule != "AdamW")
    return Case(optimizer, megalr, plain if has_reference else None, model, UPDATES)


def _constant(rate: float, step: int) -> float:
    return rate


CASES = {
    "low-rank": low_rank(small_llama),
    "low-rank, momentum transported, Muon": low_rank(rule="Muon", moments="transport"),
}
SETTINGS = {
    "low-rank, reset of all": low_rank(scope="all"),
    "low-rank, reset of all, StableSPAM": low_rank(rule="StableSPAM", scope="all"),
    "low-rank, moments transported": low_rank(moments="transport"),
    "low-rank, moments kept": low_rank(moments="keep"),
    **{f"low-rank, {name}": low_rank(rule=name) for name, r in REFERENCES.items() if r.on_factors is not None},
}
