"""One plain PyTorch process that trains layers with factors in the place of weights, as their papers write them.

Each parametrization is a module of a few lines that forms its whole weight where it has one; autograd does the rest.
Only the start of the factors comes from megalr. Nothing is of its layers' passes or its optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import megalr
from megalr.seeding import generator
from tests.references import reference_for
from tests.references.common import Adam

Adams = dict[str, Adam]


class ByRule(Adam):
    """Another rule's direction, from its reference, in the place of Adam's."""

    def __init__(self, reference: Any) -> None:
        self.reference = reference

    def direction(self, g: Tensor) -> Tensor:
        return self.reference.update(g)

    def reset(self) -> None:
        self.reference.reset()


class Plain(nn.Module):
    """A linear layer; ``start`` holds what the layer of megalr started with, by name."""

    trained: tuple[str, ...] = ()

    def __init__(self, name: str, start: dict[str, Tensor], section: dict[str, Any]) -> None:
        super().__init__()
        self.name, self.section = name, section
        self.r = section["rank"]
        self.s = section.get("alpha", self.r) / self.r
        for key in self.trained:
            self.register_parameter(key, nn.Parameter(start[key].detach().clone()))
        self.register_parameter("bias", None if start.get("bias") is None else nn.Parameter(start["bias"].clone()))

    def dense(self) -> Tensor:
        """W, (m, n)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.dense().T
        return y if self.bias is None else y + self.bias

    def step(self, grads: dict[str, Tensor], adams: Adams, lr: float, decay: float, t: int) -> None:
        """Update number t (1, 2, ...) of what is trained: AdamW."""
        for key, g in grads.items():
            w = getattr(self, key)
            w -= lr * (adams[key].direction(g) + decay * w)

    def end_update(self, t: int, adams: Adams) -> bool | str:
        """What follows update t, here a momentum reset.

        Returns:
            Whether the learning rate of the factors warms up again; "all": everything else starts again, too.
        """
        every = self.section.get("restarts", {}).get("reset_every")
        if not every or t % every != 0:
            return False
        for key in self.trained:
            adams[key].reset()
        return True

    def exported(self) -> dict[str, Tensor]:
        return {"weight": self.dense()}


class LowRank(Plain):
    """W = s B A, with the refactorization and reset of arXiv 2505.22922 where the section "restarts" asks for them."""

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


class SLTrain(LowRank):
    """arXiv 2406.02214, equation 2: W = s B A + S, S with values V at the places I."""

    trained = ("B", "A", "values")

    def __init__(self, name: str, start: dict[str, Tensor], section: dict[str, Any]) -> None:
        super().__init__(name, start, section)
        self.I = start["support"].long()

    def dense(self) -> Tensor:
        m, n = self.B.shape[0], self.A.shape[1]
        S = torch.zeros(m * n).index_put((self.I,), self.values).view(m, n)
        return self.product() + S


class Lora(LowRank):
    """arXiv 2106.09685, equation 3: W = W0 + s B A."""

    def __init__(self, name: str, start: dict[str, Tensor], section: dict[str, Any]) -> None:
        super().__init__(name, start, section)
        self.W0 = start["weight"].detach().clone()

    def dense(self) -> Tensor:
        return self.W0 + self.product()


class Relora(Lora):
    """arXiv 2307.05695, algorithm 1; a moment that is pruned by its size takes the first moment beside it with it."""

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


class Cola(Plain):
    """arXiv 2502.10940, equation 3: y = B silu(A x)."""

    trained = ("B", "A")

    def forward(self, x: Tensor) -> Tensor:
        a = x @ self.A.T
        y = a * torch.sigmoid(a) @ self.B.T
        return y if self.bias is None else y + self.bias

    def exported(self) -> dict[str, Tensor]:
        return {"B": self.B, "A": self.A}


class Mora(Plain):
    """arXiv 2405.12130: W = W0 + D M C of equation 6 (type 1), and with rotations, equations 9 and 10 (type 6)."""

    trained = ("M",)

    def __init__(self, name: str, start: dict[str, Tensor], section: dict[str, Any]) -> None:
        super().__init__(name, start, section)
        self.W0 = start["weight"].detach().clone()

    def dense(self) -> Tensor:
        (m, n), h = self.W0.shape, math.isqrt(sum(self.W0.shape) * self.r)
        if self.section.get("mora_type", 6) == 1:
            C = torch.zeros(h, n)
            for place in range(-(-n // h) * h):
                C[place % h, place % n] += 1
            D = torch.zeros(m, h)
            for row in range(m):
                D[row, row % h] = 1
            return self.W0 + D @ self.M @ C
        h = h // 2 * 2
        runs = -(-n // h)
        blocks = []
        for i in range(runs):
            P, R = torch.zeros(h, n), torch.zeros(h, h)
            for j in range(h):
                P[j, (i * h + j) % n] = 1
            for j in range(h // 2):
                angle = i / 10000 ** (2 * j / h)
                R[j, j] = R[j + h // 2, j + h // 2] = math.cos(angle)
                R[j, j + h // 2], R[j + h // 2, j] = -math.sin(angle), math.sin(angle)
            blocks.append(self.M @ R @ P)
        stacked = torch.cat(blocks)
        return self.W0 + torch.cat([stacked] * -(-m // len(stacked)))[:m]


class Loro(LowRank):
    """LORO, openreview i0zzO7Hslk, with whole matrices: W <- nearest of rank r to W - lr Pi(G) every K updates."""

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


class SwitchLora(Plain):
    """arXiv 2406.06564: W = W0 + s sum_i b_i a_i; vectors take turns with candidates, and W stays as it is."""

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


PLAIN: dict[str, type[Plain]] = {
    "low_rank": LowRank,
    "sltrain": SLTrain,
    "lora": Lora,
    "relora": Relora,
    "cola": Cola,
    "mora": Mora,
    "loro": Loro,
    "switchlora": SwitchLora,
}


def plain_factors(
    model: nn.Module,
    data: Sequence[Tensor],
    section: dict[str, Any],
    params: dict[str, Any],
    *,
    clip: float,
    rule: tuple[str, Mapping[str, Any]] | None = None,
) -> dict[str, Tensor]:
    """Train in place; the weights by name, those of replaced layers as :meth:`Plain.exported` gives them.

    Args:
        model: dense, with a loss in what it returns.
        data: token ids of each update, (sequences, length).
        section: the JSON's ``megalr.parametrization``, and "restarts".
        params: the JSON's ``optimizer.params``.
        clip: the largest norm of all gradients together.
        rule: on what the layers train and on other linear layers but the head, its type and settings, where that is
            not AdamW.
    """
    layers = _replace(model, section)
    ours = {f"{name}.{key}" for name, layer in layers.items() for key in layer.trained}
    weights = {n: w for n, w in model.named_parameters() if w.requires_grad}
    warmup = section.get("restarts", {}).get("warmup", section.get("restart_warmup_steps"))
    adams = {n: Adam(params.get("betas", (0.9, 0.999)), params.get("eps", 1e-8)) for n in weights}
    if rule is not None:
        linear = {f"{n}.weight" for n, module in model.named_modules() if isinstance(module, nn.Linear)}
        for name in ours | linear - {"lm_head.weight"}:
            adams[name] = ByRule(reference_for(rule[0], weights[name].shape, rule[1], seed=0, name=name, phase=0))
    since: dict[str, int | None] = {"factors": None, "dense": None}
    for t, ids in enumerate(data, start=1):
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        grads = {n: torch.zeros_like(w) if w.grad is None else w.grad for n, w in weights.items()}
        norm = math.sqrt(sum(g.double().square().sum().item() for g in grads.values()))
        grads = {n: g * min(1.0, clip / (norm + 1e-6)) for n, g in grads.items()}
        ramp = {k: 1.0 if n is None else 0.001 + 0.999 * min(1.0, n / warmup) for k, n in since.items()}
        since = {k: None if n is None else n + 1 for k, n in since.items()}
        with torch.no_grad():
            for name in weights.keys() - ours:
                settings = dict(params)
                if "embed" in name or "lm_head" in name:
                    settings |= params.get("embedding", {})
                elif weights[name].ndim < 2:
                    settings |= {"weight_decay": 0.0}
                decay, lr = settings.get("weight_decay", 0.0), settings["lr"] * ramp["dense"]
                weights[name] -= lr * (adams[name].direction(grads[name]) + decay * weights[name])
            for name, layer in layers.items():
                own = {key: adams[f"{name}.{key}"] for key in layer.trained}
                mine = {key: grads[f"{name}.{key}"] for key in layer.trained}
                layer.step(mine, own, params["lr"] * ramp["factors"], params.get("weight_decay", 0.0), t)
                if restarted := layer.end_update(t, own):
                    since["factors"] = 0
                    if restarted == "all":
                        since["dense"] = 0
                        for other in weights.keys() - ours:
                            adams[other].reset()
    result = {n: w.detach().clone() for n, w in model.named_parameters() if n not in ours}
    for name, layer in layers.items():
        result |= {f"{name}.{key}": w.detach() for key, w in layer.exported().items()}
    return result


def _replace(model: nn.Module, section: dict[str, Any]) -> dict[str, Plain]:
    """Our plain layers in the place of megalr's, starting as they do."""
    given = {key: value for key, value in section.items() if key != "restarts"}
    dense = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    megalr.parametrize(model, {"megalr": {"parametrization": given}})
    layers: dict[str, Plain] = {}
    for name in sorted(dense):
        module = model.get_submodule(name)
        if isinstance(module, nn.Linear):
            continue
        start = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        parent, _, child = name.rpartition(".")
        layers[name] = PLAIN[section["type"]](name, start, section)
        setattr(model.get_submodule(parent), child, layers[name])
    return layers
