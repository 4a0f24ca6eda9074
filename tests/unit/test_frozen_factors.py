"""Factors that a job has frozen before the optimizer is built: left alone, or refused by name."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn

import megalr
from megalr.errors import UserError
from megalr.layers import factor_pairs

TARGETS = {"target_modules": ["attn", "mlp"]}
SECTIONS = {
    "low_rank": {"parametrization": {"type": "low_rank", "rank": 2, **TARGETS}, "refactorization": {"interval": 2}},
    "sltrain": {
        "parametrization": {"type": "sltrain", "rank": 2, "density": 0.2, **TARGETS},
        "refactorization": {"interval": 2},
    },
    "lora": {"parametrization": {"type": "lora", "rank": 2, **TARGETS}, "refactorization": {"interval": 2}},
    "relora": {
        "parametrization": {"type": "relora", "rank": 2, "merge_every": 2, "restart_warmup_steps": 0, **TARGETS}
    },
    "switchlora": {
        "parametrization": {"type": "switchlora", "rank": 2, "switch_interval": 2, "frozen_steps": 1, **TARGETS}
    },
    "loro": {"parametrization": {"type": "loro", "rank": 2, "exact_every": 2, "restart_warmup_steps": 0, **TARGETS}},
    "projected": {"parametrization": {"type": "projected", "rank": 2, "update_proj_gap": 2, **TARGETS}},
    "cola": {"parametrization": {"type": "cola", "rank": 2, **TARGETS}},
    "mora": {"parametrization": {"type": "mora", "rank": 2, **TARGETS}},
}
REFACTORIZED = ("low_rank", "sltrain", "lora")


def config_of(method):
    return {"optimizer": {"type": "AdamW", "params": {"lr": 1e-2}}, "megalr": SECTIONS[method]}


def model_of(method):
    torch.manual_seed(0)
    net = nn.Sequential()
    for name, shape in (("attn", (6, 8)), ("mlp", (8, 7)), ("head", (7, 3))):
        net.add_module(name, nn.Linear(*shape))
    megalr.parametrize(net, config_of(method))
    for name, parameter in net.named_parameters():
        if name.endswith((".B", ".R")):
            nn.init.normal_(parameter, std=0.1)  # nothing that is frozen is zero
    return net


def freeze(net, *starts):
    for name, parameter in net.named_parameters():
        if name.startswith(starts):
            parameter.requires_grad_(False)
    return net


def train(net, method, updates=5):
    optimizer = megalr.build_optimizer(net, config_of(method))
    torch.manual_seed(1)
    for _ in range(updates):
        optimizer.zero_grad()
        net(torch.randn(4, 6)).square().sum().backward()
        optimizer.step()
    return optimizer


def moved(net, method, *starts, updates=5):
    """The names of the parameters that training moves, and the optimizer."""
    before = {name: p.detach().clone() for name, p in freeze(net, *starts).named_parameters()}
    optimizer = train(net, method, updates)
    return {name for name, p in net.named_parameters() if not torch.equal(before[name], p)}, optimizer


@pytest.mark.parametrize("method", SECTIONS)
def test_a_frozen_layer_stays_and_the_others_are_trained(method):
    net = model_of(method)
    changed, _ = moved(net, method, "attn.")
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    assert trained <= changed and not any(name.startswith("attn.") for name in changed)


@pytest.mark.parametrize("method", SECTIONS)
def test_all_layers_may_be_frozen(method):
    net = model_of(method)
    assert moved(net, method, "attn.", "mlp.")[0] == {"head.weight", "head.bias"}


@pytest.mark.parametrize("method", SECTIONS)
def test_a_frozen_copy_in_the_model_stays(method):
    class Pair(nn.Module):
        def __init__(self, student):
            super().__init__()
            self.student, self.teacher = student, copy.deepcopy(student).requires_grad_(False)

        def forward(self, x):
            return self.student(x) - self.teacher(x) + 1.0

    net = Pair(model_of(method))
    changed, _ = moved(net, method)
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    assert trained <= changed and not any(name.startswith("teacher.") for name in changed)


@pytest.mark.parametrize("method", REFACTORIZED)
@pytest.mark.parametrize(("frozen", "trained"), [("A", "B"), ("B", "A")])
def test_a_refactorization_leaves_a_pair_with_a_frozen_factor_as_it_is(method, frozen, trained, caplog):
    net = model_of(method)
    with caplog.at_level(logging.WARNING):
        changed, optimizer = moved(net, method, f"attn.{frozen}", updates=4)
    assert f"attn.{trained}" in changed and f"attn.{frozen}" not in changed
    assert f"one factor is frozen as they are: attn.{frozen}" in caplog.text
    assert optimizer.last_events == ["refactorization"] and list(factor_pairs(net)) == [("mlp.B", "mlp.A")]
    torch.testing.assert_close(net.mlp.B.T @ net.mlp.B, net.mlp.A @ net.mlp.A.T)


@pytest.mark.parametrize("method", REFACTORIZED)
def test_a_refactorization_of_no_pair_is_refused(method):
    net = freeze(model_of(method), "attn.A", "mlp.B")
    with pytest.raises(UserError, match=r"one factor of each trained layer is frozen .*: attn.A, mlp.B. Remove megalr"):
        megalr.build_optimizer(net, config_of(method))


@pytest.mark.parametrize("method", ["relora", "switchlora", "loro"])
@pytest.mark.parametrize(("frozen", "trained"), [("A", "B"), ("B", "A")])
def test_events_that_rewrite_both_factors_refuse_a_frozen_one(method, frozen, trained):
    net = freeze(model_of(method), f"mlp.{frozen}")
    words = f"mlp.{frozen} is frozen .*, and mlp.{trained} is trained, but .*Freeze both factors"
    with pytest.raises(UserError, match=words):
        megalr.build_optimizer(net, config_of(method))


@pytest.mark.parametrize("method", ["relora", "switchlora", "projected"])
def test_a_weight_that_events_write_is_not_trained_besides(method):
    net = model_of(method)
    net.attn.frozen_weight.requires_grad_()
    with pytest.raises(UserError, match=r"attn.weight is trained .* call requires_grad_\(False\) on it"):
        megalr.build_optimizer(net, config_of(method))
    freeze(net, "attn.R", "attn.B", "attn.A")  # nothing writes it any more
    megalr.build_optimizer(net, config_of(method))


def test_a_basis_is_not_trained_besides():
    net = model_of("projected")
    net.mlp.basis.requires_grad_()
    with pytest.raises(UserError, match=r"mlp.basis is trained .* call requires_grad_\(False\) on it"):
        megalr.build_optimizer(net, config_of("projected"))


@pytest.mark.parametrize("shared", [True, False])
def test_layers_that_share_a_basis_are_frozen_together(shared):
    section = {"type": "projected", "rank": 2, "share_basis": shared, "target_modules": ["proj"]}
    config = {"megalr": {"parametrization": section}}
    net = nn.ModuleDict({f"{name}_proj": nn.Linear(6, 6) for name in "qkv"})
    megalr.parametrize(net, config)
    freeze(net, "k_proj.R")
    if shared:
        with pytest.raises(UserError, match=r'k_proj.R is frozen .* q_proj.R is trained, .*"share_basis": false'):
            megalr.build_optimizer(net, config)
        freeze(net, "q_proj.R", "v_proj.R")
    megalr.build_optimizer(net, config)


def test_a_parameter_without_elements_is_in_no_group_of_its_own():
    net = nn.Sequential(nn.Linear(6, 6))
    net.pad, net.gap = nn.Parameter(torch.zeros(0, 6)), nn.Parameter(torch.zeros(0))
    config = {"optimizer": {"type": "GaLoreAdamW", "params": {"rank": 2, "target_modules": ["0"]}}}
    groups = megalr.build_optimizer(net, config).param_groups
    assert [(group["name"], len(group["params"])) for group in groups] == [("matrices", 1), ("norm", 2)]
    freeze(net, "0.")
    with pytest.raises(UserError, match="the model trains nothing"):
        megalr.build_optimizer(net, {"optimizer": {"type": "AdamW"}})


def test_a_parameter_without_dimensions_is_trained_without_an_engine():
    net = nn.Linear(6, 6)
    net.scale = nn.Parameter(torch.tensor(2.0))
    optimizer = megalr.build_optimizer(net, {"optimizer": {"type": "AdamW", "params": {"lr": 0.1}}})
    (net(torch.ones(1, 6)).sum() * net.scale + net.scale).backward()
    optimizer.step()
    assert net.scale.shape == () and abs(net.scale.item() - 2.0) == pytest.approx(0.1, rel=1e-3)


def test_a_complex_parameter_is_refused_unless_it_is_frozen():
    net = nn.Linear(6, 6)
    net.phase = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    for act in (megalr.build_optimizer, lambda *given: megalr.initialize(model=given[0], config=given[1])):
        with pytest.raises(UserError, match="phase is complex, .*view_as_complex, or freeze it"):
            act(net, {"train_batch_size": 1, "optimizer": {"type": "AdamW"}})
    net.phase.requires_grad_(False)
    megalr.build_optimizer(net, {"optimizer": {"type": "AdamW"}})
