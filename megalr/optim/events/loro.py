"""LORO's updates: AdamW on the factors, and every K-th a step on the manifold of rank-r matrices.

The step needs both factors with their directions, and DeepSpeed hands over gradients one flat buffer at a time. So an
update with an exact step updates the moments alone, buffer by buffer; once it is over, each pair is brought together at
its owner with its moments, which give Adam's directions, and the new pair goes back.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from megalr.layers.base import Parametrization
from megalr.layers.loro import LoroConfig
from megalr.layers.low_rank import LowRankLinear
from megalr.layout.exchange import Exchange, Field, copy_into, run_of
from megalr.layout.layout import Fragment
from megalr.layout.placement import Unit
from megalr.layout.rounds import Rounds
from megalr.layout.shard import Shard
from megalr.ops import low_rank_adam
from megalr.optim.events.base import LayerEvents, Moments, Step
from megalr.optim.events.refactorization import pair_units

logger = logging.getLogger(__name__)


class RiemannianSteps(LayerEvents):
    """The updates of a model's LORO layers; exact steps of all after the same updates."""

    parametrization: ClassVar[type[Parametrization]] = LoroConfig
    rewrites: ClassVar[str] = 'an exact step of LORO moves both together; "type": "low_rank" makes no such steps'
    group: ClassVar[str] = "factors"

    def __init__(self, layers: Mapping[str, Any], config: LoroConfig, seed: int) -> None:
        """
        Args:
            layers: the model's, by qualified name.
            config: the "parametrization" section.
            seed: not used, nothing is random.
        """
        self.restart_warmup_steps = config.restart_warmup_steps
        self.remainders: dict[str, Tensor] = {}
        self._layers: dict[str, LowRankLinear] = dict(layers)
        self._config = config
        self._steps = 0
        self._last: Step

    @property
    def made(self) -> int:
        return self._steps

    def attach(self, shard: Shard, exchange: Exchange, moments: Moments) -> None:
        super().attach(shard, exchange, moments)
        names = [name for name in self._layers if f"{name}.B" in shard.layout.shapes]
        self._units = pair_units([(f"{name}.B", f"{name}.A") for name in names], shard.layout)
        self._own: list[tuple[Fragment, float]] = [
            (fragment, self._config.lazy_scale(self._layers[name]))
            for name in names
            for factor in ("B", "A")
            for fragment in shard.layout.on(f"{name}.{factor}", shard.rank)
        ]

    def update(self, which: Sequence[int], gradients: Field, step: Step) -> None:
        """A lazy update: AdamW; or, where an exact step is due, the moments' part of it."""
        exact = self.due(step.updates + 1)
        self._last = step
        by_scale: dict[float, list[Fragment]] = {}
        for fragment, scale in self._own:
            if fragment.buffer in which:
                by_scale.setdefault(0.0 if exact else scale, []).append(fragment)
        fields = (self._shard.buffers, gradients, self._moments("exp_avg"), self._moments("exp_avg_sq"))
        for scale, own in by_scale.items():
            weights, grads, *moments = ([run_of(flat, fragment) for fragment in own] for flat in fields)
            low_rank_adam(
                weights,
                grads,
                *moments,
                steps=[step.count] * len(own),
                lr=step.lr * scale,
                betas=step.betas,
                eps=step.eps,
                # Decay is by the learning rate itself; there is none in an exact step.
                weight_decay=step.weight_decay / scale if scale else 0.0,
            )

    def resets_due(self, updates: int) -> set[str]:
        return self._restarted() if self.due(updates) else set()

    def restarts_due(self, updates: int) -> set[str]:
        return self._restarted() if self.due(updates) else set()

    def end_update(self, updates: int) -> list[int]:
        if not self.due(updates):
            return []
        self._steps += 1
        masters, moments = self._shard.buffers, [self._moments(key) for key in ("exp_avg", "exp_avg_sq")]
        Rounds(self._exchange, self._units, [masters, *moments]).run(self._exact, [copy_into(masters)])
        for fragment, _ in self._own:
            for field in moments:
                run_of(field, fragment).zero_()
        return sorted({f.buffer for unit in self._units for n in unit.names for f in self._shard.layout.of(n)})

    def numbers(self) -> dict[str, Any]:
        return {"exact_steps": self._steps}

    def load_numbers(self, numbers: Mapping[str, Any]) -> None:
        self._steps = numbers["exact_steps"]

    def due(self, updates: int) -> bool:
        return updates % self._config.exact_every == 0

    def _restarted(self) -> set[str]:
        return {"factors", "dense"} if self._config.restart == "all" else {"factors"}

    def _exact(self, own: Sequence[Unit], whole: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
        """The new pairs of those that come whole with their moments."""
        results: dict[str, list[Tensor]] = {}
        for b, a in (unit.names for unit in own):
            (old_b, *moments_b), (old_a, *moments_a) = whole.pop(b), whole.pop(a)
            directions = self._direction(*moments_b), self._direction(*moments_a)
            found = exact_step(old_b, old_a, *directions, lr=self._last.lr)
            if found is None:
                logger.warning("%s: no exact step: not finite, or of lower rank than r", b.removesuffix(".B"))
            results[b], results[a] = ([new] for new in found or (old_b, old_a))
        return results

    def _direction(self, exp_avg: Tensor, exp_avg_sq: Tensor) -> Tensor:
        """Adam's, from moments that this update's gradient is in."""
        (beta1, beta2), count = self._last.betas, self._last.count
        root = exp_avg_sq.sqrt().div_(math.sqrt(1 - beta2**count)).add_(self._last.eps)
        return exp_avg / (1 - beta1**count) / root


def exact_step(
    b: Tensor, a: Tensor, direction_b: Tensor, direction_a: Tensor, *, lr: float
) -> tuple[Tensor, Tensor] | None:
    """One step on the manifold of matrices of rank r, from W = B A to the retraction of W - lr · Π(G).

    With B = U R_B and Aᵀ = V R_A, G V = (direction of B) R_A⁻¹ and Uᵀ G = R_B⁻ᵀ (direction of A). The projection of G
    onto the tangent space at W is Π(G) = U K0 Vᵀ + U (Q1 K1)ᵀ + (Q2 K2) Vᵀ, with K0 = Uᵀ G V and the QR decompositions
    of the *orthogonal remainders* Q1 K1 = (I - V Vᵀ) Gᵀ U and Q2 K2 = (I - U Uᵀ) G V. So W - lr Π(G) is
    [U Q2] S [V Q1]ᵀ with a core S of 2r x 2r; its SVD gives the nearest matrix of rank r, split evenly.

    Args:
        b: (m, r).
        a: (r, n).
        direction_b, direction_a: of their shapes, what stands for the gradients of B and A.
        lr: step length.

    Returns:
        The new B and A, fp32, with Bᵀ B = A Aᵀ; None where something is not finite or the product has a rank below r.
    """
    rank = b.shape[1]
    b, a, db, da = (t.double() for t in (b, a, direction_b, direction_a))
    u, rb = torch.linalg.qr(b)  # (m, r), (r, r)
    v, ra = torch.linalg.qr(a.T)  # (n, r), (r, r)
    try:
        gv = torch.linalg.solve_triangular(ra, db, upper=True, left=False)  # (m, r)
        ug = torch.linalg.solve_triangular(rb.T, da, upper=False)  # (r, n)
        k0 = ug @ v
        q1, k1 = torch.linalg.qr(ug.T - v @ k0.T)  # (n, r), (r, r)
        q2, k2 = torch.linalg.qr(gv - u @ (u.T @ gv))  # (m, r), (r, r)
        core = torch.zeros(2 * rank, 2 * rank, dtype=b.dtype, device=b.device)
        core[:rank, :rank] = rb @ ra.T - lr * k0
        core[:rank, rank:] = -lr * k1.T
        core[rank:, :rank] = -lr * k2
        left, sizes, right = torch.linalg.svd(core)
    except torch.linalg.LinAlgError:  # singular, or not finite
        return None
    root = sizes[:rank].sqrt()
    new_b = torch.cat([u, q2], 1) @ (left[:, :rank] * root)
    new_a = (root[:, None] * right[:rank]) @ torch.cat([v, q1], 1).T
    new_b, new_a = new_b.float(), new_a.float()
    usable = torch.isfinite(new_b).all() & torch.isfinite(new_a).all()
    return (new_b, new_a) if usable else None
