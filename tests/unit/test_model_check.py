"""What is noticed of a model that somebody changed: on one process, without an engine, and on hand-made shards."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import megalr
from megalr.errors import UserError
from megalr.layout.layout import Fragment, Layout
from megalr.layout.shard import Shard, Twin
from megalr.optim.model_check import written

N = 23  # neither a multiple of what eight bytes hold


def shard(weight: torch.Tensor, master: torch.Tensor) -> Shard:
    layout = Layout(1, {"w": (N,)}, [Fragment("w", 0, N, 0, 0, 0)])
    return Shard(layout, [master], [master], 0, None, lambda buffer: None, twins=lambda: [Twin("w", weight, master)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("start", [0, 1, 4])
def test_a_weight_is_its_master_in_its_own_dtype(dtype, start):
    master = torch.randn(N + start)[start:]
    weight = torch.cat([torch.zeros(start), master]).to(dtype)[start:]
    assert written(shard(weight, master)) == []
    for place in (0, N - 1):
        other = weight.clone()
        other[place] = torch.nextafter(other[place].float(), torch.tensor(9.0)) if dtype == torch.float32 else 9.0
        assert written(shard(other, master)) == ["w"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_no_number_any_more_was_not_written(dtype):
    master = torch.full((N,), float("nan"))
    master[3] = float("inf")
    assert written(shard(master.to(dtype), master)) == []
    weight = master.to(dtype).clone()
    weight[4] = 0.0
    assert written(shard(weight, master)) == ["w"]


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_after_a_load_weights_may_have_been_rounded(half):
    master = torch.randn(N)
    weight = master.to(half).float()
    assert written(shard(weight, master)) == ["w"]
    assert written(shard(weight, master), are_loaded=True) == []
    assert written(shard(weight + 1, master), are_loaded=True) == ["w"]


def optimizer_of(model: nn.Module) -> megalr.MegalrOptimizer:
    optimizer = megalr.build_optimizer(model, {"optimizer": {"type": "AdamW", "params": {"lr": 0.1}}})
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    return optimizer


def test_an_ordinary_job_is_told_too():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    optimizer = optimizer_of(model)
    with torch.no_grad():
        model[0].weight.fill_(2.0)  # the masters are the weights
    optimizer.step()
    before = [p.clone() for p in model.parameters()]
    model.requires_grad_(False)
    with pytest.raises(UserError, match=r"^frozen after .*: 0\.weight, 1\.weight, 2\.weight and 3 more\."):
        optimizer.step()
    model.requires_grad_(True)
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    optimizer.step()
    assert not torch.equal(model[0].weight, before[0])
    model.double()
    with pytest.raises(UserError, match=r"^in other memory or of another dtype"):
        optimizer.step()


def test_a_parameter_without_elements_has_nothing_to_train():
    model = nn.Sequential(nn.Linear(3, 3))
    optimizer = optimizer_of(model)
    model.nothing = nn.Parameter(torch.zeros(0, 4))
    optimizer.step()
    model.something = nn.Parameter(torch.zeros(1))
    with pytest.raises(UserError, match=r"^trained by nobody, and missing from checkpoints: something\."):
        optimizer.step()


def test_an_optimizer_takes_no_more_parameters_and_is_not_copied():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    optimizer = megalr.build_optimizer(model, {"optimizer": {"type": "AdamW", "params": {"lr": 0.1}}})
    groups = len(optimizer.param_groups)
    with pytest.raises(UserError, match="takes no parameters after it was built"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    assert len(optimizer.param_groups) == groups
    for copied in (copy.deepcopy, copy.copy, pickle.dumps):
        with pytest.raises(UserError, match="cannot be copied or pickled"):
            copied(optimizer)


@pytest.mark.parametrize(("key", "value"), [("betas", (0.5, 0.999)), ("eps", 1e-4)])
def test_betas_that_a_rule_would_not_read_are_refused(key, value):
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    config = {"optimizer": {"type": "GaLoreAdamW", "params": {"lr": 0.1, "rank": 2}}}
    optimizer = megalr.build_optimizer(model, config)

    def step() -> None:
        model(torch.randn(3, 4)).square().sum().backward()
        optimizer.step()

    matrices, norm = optimizer.param_groups
    given = matrices[key]
    matrices["betas"] = list(matrices["betas"])  # as some checkpoints have them
    norm[key] = value  # AdamW reads it
    step()
    matrices[key] = value
    with pytest.raises(
        UserError, match=f'^param_groups has {key} .* for the group "matrices".* galore, goes on with .* as it was'
    ):
        step()
    assert optimizer.updates == 1
    matrices[key] = given
    step()
