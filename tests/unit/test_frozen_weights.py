"""W0 takes over R Qᵀ: three roundings, on one process and cut by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import megalr
from megalr.errors import UserError
from megalr.layout.exchange import Exchange
from megalr.layout.layout import Fragment, Layout
from megalr.layout.shard import Shard
from megalr.optim.frozen_weights import FrozenWeights

M, N = 64, 48
NAME = "attn"


def merging(rounding, seed=0):
    """On one process that holds everything."""
    layout = Layout(1, {f"{NAME}.R": (M, 2)}, [Fragment(f"{NAME}.R", 0, 2 * M, 0, 0, 0)])
    shard = Shard(layout, [torch.zeros(2 * M)], [torch.zeros(2 * M)], 0, None, lambda buffer: None)
    return FrozenWeights(rounding, shard, Exchange(layout, 0, None), seed, {}, "R")


def weight(dtype):
    torch.manual_seed(0)
    return nn.Parameter(torch.randn(M, N).to(dtype), requires_grad=False)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "remainder"])
def test_fp32_needs_no_rounding(rounding):
    w, delta = weight(torch.float32), torch.randn(M, N)
    expected = 0.5 * w + delta
    merging(rounding).take(NAME, w, delta.clone(), decay=0.5, count=0)
    torch.testing.assert_close(w.data, expected, rtol=1e-6, atol=1e-6)


def test_nearest():
    w, delta = weight(torch.bfloat16), torch.randn(M, N)
    expected = (0.9 * w.float() + delta).to(torch.bfloat16)
    merging("nearest").take(NAME, w, delta.clone(), decay=0.9, count=0)
    assert torch.equal(w.data, expected)


def test_stochastic_rounding_takes_a_neighbour_and_is_right_on_average():
    delta = torch.randn(M, N)
    total = weight(torch.bfloat16).float() + delta
    down = total.view(torch.int32).bitwise_and(-65536).view(torch.float32)  # towards zero
    step = (down.view(torch.int32) + 65536).view(torch.float32) - down
    rule, sums, times = merging("stochastic"), torch.zeros(M, N), 400
    for count in range(times):
        w = weight(torch.bfloat16)
        rule.take(NAME, w, delta.clone(), decay=1.0, count=count)
        away = (w.float() - down) / step
        assert ((away == 0) | (away == 1)).all()
        sums += away
    odds = (total - down) / step
    # A mean of 400 draws lies within five standard deviations, 0.125 at most.
    assert ((sums / times - odds).abs() < 0.125).all()
    assert (sums / times - odds).mean().abs() < 2e-3


def test_stochastic_rounding_depends_on_seed_name_and_count_alone():
    def once(seed, name, count):
        w = weight(torch.bfloat16)
        rule = merging("stochastic", seed)
        rule.take(name, w, torch.full((M, N), 1e-3), decay=1.0, count=count)
        return w.data

    assert torch.equal(once(0, "a", 3), once(0, "a", 3))
    for other in ((1, "a", 3), (0, "b", 3), (0, "a", 4)):
        assert not torch.equal(once(0, "a", 3), once(*other))


def test_a_remainder_keeps_what_nearest_loses():
    """Additions of a thousandth of a weight are nothing to bf16, a hundred of them are."""
    start = weight(torch.bfloat16)
    delta = 1e-3 * start.float()
    found = {}
    for rounding in ("nearest", "remainder"):
        w, rule = weight(torch.bfloat16), merging(rounding)
        for count in range(100):
            rule.take(NAME, w, delta.clone(), decay=1.0, count=count)
        found[rounding] = w.float()
    expected = 1.1 * start.float()
    assert torch.equal(found["nearest"], start.float())
    assert ((found["remainder"] - expected).abs() <= 2**-8 * expected.abs()).all()  # bf16's own spacing


def test_other_dtypes_of_16_bits_are_refused():
    w = nn.Parameter(torch.zeros(M, N, dtype=torch.float16), requires_grad=False)
    with pytest.raises(UserError, match='which is for bf16, but the weights are torch.float16: write "nearest"'):
        merging("stochastic").take(NAME, w, torch.zeros(M, N), decay=1.0, count=0)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "remainder"])
@pytest.mark.parametrize(
    "section",
    [
        {"type": "relora", "merge_every": 2, "restart_warmup_steps": 1},
        {"type": "switchlora", "switch_interval": 2, "frozen_steps": 1},
        {"type": "projected", "update_proj_gap": 2, "stagger": False, "moments": "transport"},
    ],
    ids=lambda section: section["type"],
)
def test_a_model_in_bf16_without_fp32_masters(section, rounding):
    """In a plain loop the masters are the model's own weights."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"attn": nn.Linear(32, 24)}).to(torch.bfloat16)
    section = {"rank": 4, "target_modules": ["attn"], "merge_rounding": rounding, **section}
    config = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-2}}, "megalr": {"parametrization": section}}
    megalr.parametrize(model, config)
    optimizer = megalr.build_optimizer(model, config)
    layer, x = model["attn"], torch.randn(8, 32, dtype=torch.bfloat16)
    start = layer.weight.detach().clone()
    for _ in range(5):
        optimizer.zero_grad()
        (layer(x) - x[:, :24]).float().square().sum().backward()
        optimizer.step()
    assert optimizer.refreshes and layer.weight.isfinite().all()
    assert not torch.equal(layer.weight, start)
