"""LoRA and ReLoRA layers: what they compute, how they start, what pruning keeps, and what cannot be combined."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import megalr
from megalr.config.settings import MegalrConfig
from megalr.errors import UserError
from megalr.layers import densify, factor_names, factor_pairs, parametrize
from megalr.layers.lora import LoraConfig, LoraLinear
from megalr.layers.relora import ReloraConfig
from megalr.optim.events.relora import _largest

TARGETS = {"target_modules": ("attn",)}


def layer_of(**options):
    torch.manual_seed(0)
    dense = nn.ModuleDict({"attn": nn.Linear(6, 8)})
    return parametrize(copy.deepcopy(dense), LoraConfig(rank=3, alpha=12, **TARGETS, **options)), dense


def test_it_starts_as_the_dense_layer_and_trains_the_factors_alone():
    model, dense = layer_of()
    layer = model["attn"]
    x = torch.randn(2, 5, 6)
    assert torch.equal(layer(x), dense["attn"](x))
    assert layer.A.abs().max() <= 6**-0.5 and not layer.B.any()
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"attn.B", "attn.A", "attn.bias"}
    assert list(factor_pairs(model)) == [("attn.B", "attn.A")]
    assert list(factor_names(model)) == ["attn.B", "attn.A"]


def test_both_passes_are_autograds_of_the_formula():
    model, _ = layer_of()
    layer = model["attn"]
    nn.init.normal_(layer.B)
    x = torch.randn(2, 5, 6, requires_grad=True)
    expected = nn.functional.linear(x, layer.weight + 4.0 * layer.B @ layer.A, layer.bias)
    grad = torch.randn_like(expected)
    wanted = [x, layer.B, layer.A, layer.bias]
    for got, right in zip(
        torch.autograd.grad(layer(x), wanted, grad), torch.autograd.grad(expected, wanted, grad), strict=True
    ):
        torch.testing.assert_close(got, right)


def test_densify_gives_the_dense_layer_back():
    model, dense = layer_of()
    nn.init.normal_(model["attn"].B)
    dense.load_state_dict(densify(model.state_dict(), LoraConfig(rank=3, alpha=12, **TARGETS)))
    x = torch.randn(3, 6)
    torch.testing.assert_close(dense["attn"](x), model["attn"](x))


def test_a_frozen_layer_stays_frozen():
    torch.manual_seed(0)
    model = nn.ModuleDict({"attn": nn.Linear(6, 8), "attn_out": nn.Linear(8, 6)})
    model["attn"].weight.requires_grad_(False)
    parametrize(model, LoraConfig(rank=3, **TARGETS))
    assert isinstance(model["attn"], LoraLinear) and not model["attn"].B.requires_grad
    assert model["attn_out"].B.requires_grad


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("size", [7, 100, 1001])
def test_pruning_keeps_what_lies_above_the_quantile(ratio, size):
    torch.manual_seed(size)
    values = torch.randn(size)
    expected = values.abs() > torch.quantile(values.abs(), ratio)
    assert torch.equal(_largest(values, ratio), expected)


def test_a_merge_changes_no_output_and_restarts_the_factors():
    torch.manual_seed(0)
    model = nn.Sequential()
    model.attn = nn.Linear(6, 5)
    section = {"type": "relora", "rank": 2, "merge_every": 3, "moments": "reset", "restart_warmup_steps": 2}
    config = {
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "megalr": {"parametrization": {**section, "target_modules": ["attn"]}},
    }
    megalr.parametrize(model, config)
    optimizer = megalr.build_optimizer(model, config)
    layer, x = model.attn, torch.randn(4, 6)
    start = layer.A.detach().clone()
    rates = []
    for update in range(1, 7):
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        rates.append(optimizer.clocks["factors"].ramp(optimizer.layer_events.restart_warmup_steps))
        before = (layer.weight + layer.B @ layer.A).detach() if update == 3 else None
        optimizer.step()
        if update == 3:
            assert before is not None and not layer.B.any() and not torch.equal(layer.A, start)
            assert all(not optimizer.state[f]["exp_avg"].any() for f in (layer.B, layer.A))
    assert rates == pytest.approx([1, 1, 1, 0.001, 0.5005, 1])
    assert optimizer.refreshes == 2
    assert optimizer.clocks["factors"].count == 0 and optimizer.clocks["dense"].count == 6


@pytest.mark.parametrize(
    ("section", "more", "message"),
    [
        ({"type": "relora"}, {"megalr": {"refactorization": {"interval": 5}}}, "a B that starts again at zero"),
        ({"type": "relora"}, {"megalr": {"momentum_reset": {"interval": 50}}}, '"moments": "reset" and'),
        ({"type": "relora"}, {"optimizer": {"type": "Muon"}}, "a merge zeroes moments of AdamW"),
        ({"type": "relora", "merge_every": 0}, {}, "merge_every is 0; write at least 1"),
        ({"type": "relora", "restart_warmup_steps": -1}, {}, "restart_warmup_steps is -1; write at least 0"),
        ({"type": "relora", "merge_every": 3}, {}, 'steps is 100 and merge_every 3, so .*_warmup_steps": 2 or less'),
        ({"type": "relora", "merge_every": 5, "restart_warmup_steps": 5}, {}, 'restart_warmup_steps": 4 or less'),
        ({"type": "relora", "prune_ratio": 1.5}, {}, "prune_ratio is 1.5; write a share"),
        ({"type": "relora", "moments": "prune"}, {}, '"magnitude", "random", "reset", "keep"'),
        ({"type": "lora", "merge_every": 5}, {}, 'no key "merge_every"'),
        ({"type": "lora", "init": "zeros"}, {}, "B starts at zero"),
        ({"type": "lora"}, {"optimizer": {"type": "GaLoreAdamW"}}, '"lora" factors cannot be trained with galore'),
    ],
)
def test_what_is_refused(section, more, message):
    content = {"megalr": {"parametrization": section, **more.get("megalr", {})}}
    if "optimizer" in more:
        content["optimizer"] = more["optimizer"]
    with pytest.raises(UserError, match=message):
        MegalrConfig.from_json(content)


def test_what_is_allowed():
    section = {"parametrization": {"type": "lora", "rank": 4}, "refactorization": {"interval": 5}}
    for optimizer in ("AdamW", "Muon"):
        config = MegalrConfig.from_json({"optimizer": {"type": optimizer}, "megalr": section})
        assert isinstance(config.parametrization, LoraConfig)
    assert ReloraConfig().form() == {"parametrization": "relora", "rank": 128}
