"""One plain PyTorch process that trains layers with factors in the place of weights, as their papers write them.

Each parametrization is a module of a few lines that forms its whole weight where it has one; autograd does the rest.
Only the start of the factors comes from megalr. Nothing is of its layers' passes or its optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import megalr
from megalr.seeding import generator
from tests.references.common import Adam

Adams = dict[str, Adam]


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

    def end_update(self, t: int, adams: Adams) -> bool:
        """What follows update t; whether the learning rate of the factors warms up again."""
        return False

    def exported(self) -> dict[str, Tensor]:
        return {"weight": self.dense()}


class LowRank(Plain):
    """W = s B A, with the refactorization and reset of arXiv 2505.22922 where the section "restarts" asks for them."""

    trained = ("B", "A")

    def product(self) -> Tensor:
        return self.s * self.B @ self.A

    def dense(self) -> Tensor:
        return self.product()

    def end_update(self, t: int, adams: Adams) -> bool:
        restarts = self.section.get("restarts", {})
        if (every := restarts.get("refactorize_every")) and t % every == 0:
            U, S, Vh = torch.linalg.svd((self.B @ self.A).double(), full_matrices=False)
            root = S[: self.r].sqrt()
            self.B.copy_(U[:, : self.r] * root)
            self.A.copy_(root[:, None] * Vh[: self.r])
            for key in self.trained:
                adams[key].reset()
        if (every := restarts.get("reset_every")) and t % every == 0:
            for key in self.trained:
                adams[key].reset()
            return True
        return False


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

    def end_update(self, t: int, adams: Adams) -> bool:
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


PLAIN: dict[str, type[Plain]] = {"low_rank": LowRank, "sltrain": SLTrain, "lora": Lora, "relora": Relora}


def plain_factors(
    model: nn.Module, data: Sequence[Tensor], section: dict[str, Any], params: dict[str, Any], *, clip: float
) -> dict[str, Tensor]:
    """Train in place; the weights by name, those of replaced layers as :meth:`Plain.exported` gives them.

    Args:
        model: dense, with a loss in what it returns.
        data: token ids of each update, (sequences, length).
        section: the JSON's ``megalr.parametrization``, and "restarts".
        params: the JSON's ``optimizer.params``.
        clip: the largest norm of all gradients together.
    """
    layers = _replace(model, section)
    ours = {f"{name}.{key}" for name, layer in layers.items() for key in layer.trained}
    weights = {n: w for n, w in model.named_parameters() if w.requires_grad}
    warmup = section.get("restart_warmup_steps", 10)
    adams = {n: Adam(params.get("betas", (0.9, 0.999)), params.get("eps", 1e-8)) for n in weights}
    since: int | None = None
    for t, ids in enumerate(data, start=1):
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        grads = {n: torch.zeros_like(w) if w.grad is None else w.grad for n, w in weights.items()}
        norm = math.sqrt(sum(g.double().square().sum().item() for g in grads.values()))
        grads = {n: g * min(1.0, clip / (norm + 1e-6)) for n, g in grads.items()}
        ramp = 1.0
        if since is not None:
            ramp = 0.001 + 0.999 * min(1.0, since / warmup)
            since += 1
        with torch.no_grad():
            for name in weights.keys() - ours:
                settings = dict(params)
                if "embed" in name or "lm_head" in name:
                    settings |= params.get("embedding", {})
                elif weights[name].ndim < 2:
                    settings |= {"weight_decay": 0.0}
                decay = settings.get("weight_decay", 0.0)
                weights[name] -= settings["lr"] * (adams[name].direction(grads[name]) + decay * weights[name])
            restarted = False
            for name, layer in layers.items():
                own = {key: adams[f"{name}.{key}"] for key in layer.trained}
                mine = {key: grads[f"{name}.{key}"] for key in layer.trained}
                layer.step(mine, own, params["lr"] * ramp, params.get("weight_decay", 0.0), t)
                restarted |= layer.end_update(t, own)
            since = 0 if restarted else since
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
