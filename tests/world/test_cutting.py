"""Layers that tensor-parallel ranks share compute what whole ones do; a parametrization says how they are cut."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from megalr import MegalrConfig, UserError
from megalr.hosts.tensor_parallel import own_part
from megalr.layers import parametrize
from megalr.layers.base import FactorizedLinear, Parametrization
from megalr.layers.low_rank import LowRankConfig, LowRankLinear
from megalr.layers.registry import PARAMETRIZATIONS
from megalr.layers.tensor_parallel.cutting import cut_layers, types_that_are_cut
from tests.world.threads import world

CUTS = {"attn.q": "rows", "attn.k": "rows", "attn.o": "columns", "head": "gathered"}
TARGETS = {"rank": 3, "target_modules": ("attn", "head")}


class Gained(FactorizedLinear):
    """y = s ⊙ (B A x) + bias; W = diag(s) B A."""

    factors = ("B", "A")

    def __init__(self, dense: nn.Linear, rank: int) -> None:
        super().__init__()
        m, n = dense.weight.shape
        numbers = torch.Generator().manual_seed(m)
        self.s, self.B, self.A = (
            nn.Parameter(torch.randn(shape, generator=numbers)) for shape in ((m,), (m, rank), (rank, n))
        )
        self.bias, self.split = dense.bias, None

    def forward(self, x: Tensor) -> Tensor:
        latent = functional.linear(x, self.A)  # (..., r)
        if self.split is not None:
            latent = self.split.sum_gradient(latent) if self.split.rows else self.split.sum(latent)
        y = functional.linear(latent, self.s[:, None] * self.B, self.bias)
        return y if self.split is None else self.split.output(y, self.width)


@dataclass(frozen=True, kw_only=True)
class GainedConfig(Parametrization):
    """What a user would write, cuts included."""

    parts = frozenset({"s", "B", "A"})

    def replace(self, layer: nn.Linear, *, seed: int, name: str) -> Gained:
        return Gained(layer, self.rank)

    def weight(self, parts: Any) -> Tensor:
        return parts["s"][:, None] * (parts["B"] @ parts["A"])

    def cut(self, layer: nn.Module, split: Any) -> None:
        layer.split, layer.width = split, len(layer.s)
        split.keep(layer, *(("s", "B", "bias") if split.rows else ("A",)))


class Model(nn.Module):
    """Two column-parallel layers with one input, a row-parallel one behind them, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({"q": nn.Linear(9, 7), "k": nn.Linear(9, 7), "o": nn.Linear(7, 8)})
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attn["o"](torch.tanh(self.attn["q"](x)) * self.attn["k"](x)))


def section(**values: Any) -> Parametrization:
    return MegalrConfig.from_json({"megalr": {"parametrization": {**TARGETS, **values}}}).parametrization


CUT = types_that_are_cut()
KINDS = {
    **{name: section(type=name) for name in CUT},
    "low_rank, scaled": section(type="low_rank", alpha=5),
    "sltrain, dense start": section(type="sltrain", density=0.3, init="variance_matched"),
    "projected, output": section(type="projected", side="output"),
    "projected, std": section(type="projected", side="std", compute="materialized"),
    "a user's": GainedConfig(**TARGETS),
}
NOT_CUT = [name for name, kind in PARAMETRIZATIONS.items() if issubclass(kind, Parametrization) and name not in CUT]


def made(config: Parametrization) -> Model:
    """Parametrized, with no parameter at zero."""
    torch.manual_seed(0)
    model = Model()
    parametrize(model, config)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter)
    return model


def gradients(model: Model, x: Tensor) -> dict[str, Tensor]:
    """Output and gradients, that of the input among them, over two passes."""
    x = x.clone().requires_grad_()
    (model(x).square().sum() + model(2 * x).sum()).backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"output": model(x).detach(), "x": x.grad} | trained


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_parts_compute_what_the_whole_does(kind, size):
    whole, x = made(KINDS[kind]), torch.randn(4, 9)
    expected = gradients(copy.deepcopy(whole), x)

    def rank() -> dict[str, tuple[Tensor, Tensor]]:
        model = copy.deepcopy(whole)
        cut_layers(model, KINDS[kind], CUTS, dist.group.WORLD)
        found, parameters = gradients(model, x), dict(model.named_parameters())

        def mine(name: str) -> Tensor:
            if name not in parameters:
                return expected[name]
            places = getattr(parameters[name], "megalr_indices", None)
            return own_part(parameters[name], expected[name]) if places is None else expected[name][places]

        assert sum(p.numel() for p in parameters.values()) < sum(p.numel() for p in whole.parameters())
        assert found.keys() == expected.keys()
        return {name: (value, mine(name)) for name, value in found.items()}

    for pairs in world(size, rank):
        for name, (got, wanted) in pairs.items():
            torch.testing.assert_close(
                got, wanted, rtol=1e-4, atol=1e-5, msg=lambda words, name=name: f"{name}: {words}"
            )


@pytest.mark.parametrize("kind", NOT_CUT)
def test_what_says_nothing_of_cuts_is_refused(kind):
    config = section(type=kind)
    with pytest.raises(UserError, match='attn.q is a .*Linear, which cannot be cut .* "low_rank"') as refused:
        cut_layers(made(config), config, CUTS, None)
    assert not [name for name in NOT_CUT if f'"{name}"' in str(refused.value)]


def test_layers_that_share_a_class_are_not_cut_for_that():
    assert {"loro", "lora", "relora"} <= set(NOT_CUT) and {"low_rank", "projected", "sltrain"} <= set(CUT)


def test_another_layer_of_a_derived_parametrization_is_not_cut_as_its_parents():
    class Doubled(LowRankLinear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    @dataclass(frozen=True, kw_only=True)
    class DoubledConfig(LowRankConfig):
        def replace(self, layer: nn.Linear, *, seed: int, name: str) -> LowRankLinear:
            new = super().replace(layer, seed=seed, name=name)
            new.__class__ = Doubled
            return new

    config = DoubledConfig(**TARGETS)
    with pytest.raises(UserError, match="attn.q is a Doubled, which cannot be cut .* your own needs a method `cut`"):
        cut_layers(made(config), config, CUTS, None)
