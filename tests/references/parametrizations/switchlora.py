"""SwitchLoRA, arXiv 2406.06564: single vectors of the factors take turns with candidates."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from megalr.seeding import generator
from tests.references.common import Adam
from tests.references.parametrizations.common import LAYERS, Adams, Plain, case


class SwitchLora(Plain):
    """arXiv 2406.06564: W = W0 + s sum_i b_i a_i; vectors take turns with candidates, and W stays as it is."""

    type_name = "switchlora"
    trained = ("B", "A")

    def __init__(self, name: str, start: dict[str, Tensor], section: dict[str, Any]) -> None:
        super().__init__(name, start, section)
        self.s = section.get("alpha", 1.0) / self.r
        self.W0 = start["weight"].detach().clone()
        m, n = self.W0.shape
        self.made = 0
        self.adams: dict[str, list[Adam]] = {}
        self.rests = {key: [0] * self.r for key in self.trained}
        std_a = ((m**0.5 * self.r) / n**1.5) ** 0.25 * (1 / 3) ** 0.25
        std_b = (self.r / (m * n) ** 0.5) ** 0.25 * (1 / 3) ** 0.25
        self.queue = {}
        for key, width, std in (("A", n, std_a), ("B", m, std_b)):
            numbers = [generator(0, f"{name}.{key}", "candidate", k) for k in range(min(m, n) - self.r)]
            self.queue[key] = [(2 * torch.rand(width, generator=g) - 1) * 3**0.5 * std for g in numbers]

    def dense(self) -> Tensor:
        return self.W0 + self.s * self.B.T @ self.A

    def step(self, grads: dict[str, Tensor], adams: Adams, lr: float, decay: float, t: int) -> None:
        for key, g in grads.items():
            w, adam = getattr(self, key), adams[key]
            rows = self.adams.setdefault(key, [self._fresh(adam) for _ in range(self.r)])
            for i in range(self.r):
                if t > self.rests[key][i]:
                    w[i] -= lr * (rows[i].direction(g[i]) + decay * w[i])

    def end_update(self, t: int, adams: Adams) -> bool | str:
        exact = 0.3 ** (t / self.section["descent_steps"]) * self.r / self.section["switch_interval"]
        chance = torch.rand((), generator=generator(0, self.name, "switches", t)).item()
        resting = sum(until > t for until in self.rests["A"])
        count = min(math.floor(exact) + (chance < exact % 1), self.r // 2 - resting, len(self.queue["A"]))
        for key, other, ahead in (("A", "B", 0), ("B", "A", self.r // 2)):
            vectors, counterparts = getattr(self, key), getattr(self, other)
            for k in range(self.made, self.made + count):
                i = (k + ahead) % self.r
                new, old = self.queue[key].pop(0), vectors[i].clone()
                outer = torch.outer(counterparts[i], old - new)
                self.W0 += self.s * (outer if key == "A" else outer.T)
                self.queue[key].append(old)
                vectors[i] = new
                self.adams[other][i] = self._fresh(adams[other])
                self.rests[other][i] = t + self.section["frozen_steps"]
        self.made += count
        return False

    @staticmethod
    def _fresh(adam: Adam) -> Adam:
        return Adam((adam.beta1, adam.beta2), adam.eps)


CASES = {
    "switchlora": case({"type": "switchlora", "switch_interval": 2.5, "frozen_steps": 1, "descent_steps": 20, **LAYERS})
}
