"""LORO: steps on the manifold of matrices of one rank."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.references.parametrizations.common import LAYERS, Adams, case
from tests.references.parametrizations.low_rank import LowRank


class Loro(LowRank):
    """LORO, openreview i0zzO7Hslk, with whole matrices: W <- nearest of rank r to W - lr Pi(G) every K updates."""

    type_name = "loro"

    def step(self, grads: dict[str, Tensor], adams: Adams, lr: float, decay: float, t: int) -> None:
        (m, r), n = self.B.shape, self.A.shape[1]
        dB, dA = (adams[key].direction(grads[key]) for key in ("B", "A"))
        if t % self.section["exact_every"] != 0:
            lazy = lr * self.section.get("lazy_lr_scale", r / min(m, n))
            self.B -= lazy * dB + lr * decay * self.B
            self.A -= lazy * dA + lr * decay * self.A
            return
        B, A = self.B.double(), self.A.double()
        right = dB.double() @ torch.linalg.pinv(A.T)  # G V Vt, since G At is B's gradient
        left = torch.linalg.pinv(B).T @ dA.double()  # U Ut G, since Bt G is A's
        # Adam's two directions are not of one G, so it matters from which U Ut G V Vt is taken: from A's.
        tangent = left + right - B @ torch.linalg.pinv(B) @ right
        U, S, Vh = torch.linalg.svd(B @ A - lr * tangent)
        root = S[:r].sqrt()
        self.B.copy_(U[:, :r] * root)
        self.A.copy_(root[:, None] * Vh[:r])

    def end_update(self, t: int, adams: Adams) -> bool | str:
        if t % self.section["exact_every"] != 0:
            return False
        for adam in adams.values():
            adam.reset()
        return self.section.get("restart", "all")


EXACT = {"type": "loro", "exact_every": 4, "restart_warmup_steps": 3, **LAYERS}
OTHER = {"restart": "factors", "lazy_lr_scale": 0.6, "init": "variance_matched"}
CASES = {
    "loro": case(EXACT),
    "loro, factors": case({**EXACT, "exact_every": 5, "restart_warmup_steps": 2, **OTHER}),
}
