"""ReLoRA, arXiv 2307.05695: LoRA that is merged into the weight now and then, and starts again."""

from __future__ import annotations

import torch

from megalr.seeding import generator
from tests.references.parametrizations.common import LAYERS, Adams, case
from tests.references.parametrizations.lora import Lora


class Relora(Lora):
    """arXiv 2307.05695, algorithm 1; a moment that is pruned by its size takes the first moment beside it with it."""

    type_name = "relora"

    def end_update(self, t: int, adams: Adams) -> bool | str:
        if t % self.section["merge_every"] != 0:
            return False
        count = t // self.section["merge_every"]
        self.W0 = self.dense().detach().clone()
        n = self.A.shape[1]
        self.B.zero_()
        self.A.copy_((2 * torch.rand(self.A.shape, generator=generator(0, f"{self.name}.A", count)) - 1) / n**0.5)
        how, ratio = self.section.get("moments", "magnitude"), self.section.get("prune_ratio", 0.99)
        for key, adam in adams.items():
            if how == "reset":
                adam.reset()
            if how == "magnitude":
                keep_m, keep_v = (x.abs() > torch.quantile(x.abs().flatten(), ratio) for x in (adam.m, adam.v))
                adam.m, adam.v = adam.m * keep_m * keep_v, adam.v * keep_v
            if how == "random":
                drawn = torch.rand(adam.m.numel(), generator=generator(0, f"{self.name}.{key}", "prune", count))
                keep = (drawn > ratio).view_as(adam.m)
                adam.m, adam.v = adam.m * keep, adam.v * keep
        return True


MERGES = {"type": "relora", "merge_every": 4, "restart_warmup_steps": 3, **LAYERS}
CASES = {
    "relora, magnitude": case({**MERGES, "alpha": 10.0, "prune_ratio": 0.8}),
    "relora, random": case({**MERGES, "moments": "random", "prune_ratio": 0.7}),
    "relora, reset": case({**MERGES, "moments": "reset"}),
}
