"""What megalr.initialize passes on, and what it refuses before anything is built."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import megalr
from megalr.errors import UserError
from megalr.hosts.deepspeed_config import deepspeed_section
from megalr.hosts.tensor_parallel import check_earlier_groups

LOW_RANK = {"megalr": {"parametrization": {"type": "low_rank", "rank": 2, "target_modules": ["0"]}}}


def model():
    return nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4))


def test_deepspeed_sees_its_own_sections_only():
    config = {"megalr": {}, "optimizer": {"type": "AdamW"}, "train_batch_size": 4, "zero_optimization": {"stage": 2}}
    passed = deepspeed_section(config)
    assert passed["train_batch_size"] == 4 and passed["zero_optimization"] == {"stage": 2}
    assert "megalr" not in passed and "optimizer" not in passed
    assert passed["zero_allow_untested_optimizer"] is True and passed["zero_force_ds_cpu_optimizer"] is False
    assert set(config) == {"megalr", "optimizer", "train_batch_size", "zero_optimization"}


def test_optimizer_without_parametrize_says_what_to_call():
    with pytest.raises(UserError, match=r"call megalr.parametrize\(model, config\) before"):
        megalr.build_optimizer(model(), LOW_RANK)


def test_optimizer_of_a_plain_loop_trains():
    """Without DeepSpeed it is an ordinary torch optimizer."""
    torch.manual_seed(0)
    net = megalr.parametrize(model(), LOW_RANK)
    section = {
        **LOW_RANK["megalr"],
        "refactorization": {"interval": 5},
        "momentum_reset": {"interval": 5, "warmup_steps": 4},
    }
    config = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-2}}, "megalr": section}
    optimizer = megalr.build_optimizer(net, config)
    x, y = torch.randn(32, 6), torch.randn(32, 4)
    losses = []
    for _ in range(60):
        loss = ((net(x) - y) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert optimizer.updates == 60 and optimizer.last_events == ["refactorization", "momentum_reset"]
    balanced = net[0]
    assert torch.allclose(balanced.B.T @ balanced.B, balanced.A @ balanced.A.T, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            {},
            'offload_param.device is "nvme"',
        ),
        ({}, {"optimizer": object()}, "takes no optimizer="),
        ({"megalr": {"rank": 3}}, {}, 'has no key "rank"'),
    ],
)
def test_what_cannot_work_is_refused_first(changes, arguments, message):
    net = model()
    with pytest.raises(UserError, match=message):
        megalr.initialize(model=net, config={**LOW_RANK, **changes}, **arguments)
    assert isinstance(net[0], nn.Linear)


def test_a_model_is_parametrized_once():
    net = megalr.parametrize(model(), LOW_RANK)
    for again in (megalr.parametrize, megalr.initialize):
        with pytest.raises(UserError, match="0 has been parametrized before: .* takes a dense model, once"):
            again(net, LOW_RANK)


def test_an_engine_after_a_tensor_parallel_one_is_refused(monkeypatch):
    left = SimpleNamespace(get_tensor_model_parallel_world_size=lambda: 2)
    monkeypatch.setattr("megalr.hosts.tensor_parallel.told_of_parallelism", lambda: left)
    with pytest.raises(UserError, match="had 2 tensor-parallel ranks, and this one is to have 1: DeepSpeed keeps"):
        megalr.initialize(model(), LOW_RANK)
    check_earlier_groups(2)


def test_stage_3_takes_no_compiled_model():
    config = {"zero_optimization": {"stage": 3}, "optimizer": {"type": "AdamW"}}
    for build in (megalr.build_optimizer, megalr.initialize):
        with pytest.raises(UserError, match=r"give the model itself, and call engine.compile\(\) afterwards"):
            build(nn.Sequential(torch.compile(model(), backend="eager")), config)


ARGUMENTS = SimpleNamespace(learning_rate=2e-3, weight_decay=0.1, adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=1e-7)
AUTO = {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}


def test_auto_is_read_from_training_arguments_and_completed_where_deepspeed_is_configured():
    config = {**LOW_RANK, "megalr": {**LOW_RANK["megalr"], "optimizer": {"type": "AdamW", "params": AUTO}}}
    live = json.loads(json.dumps(config))
    args = SimpleNamespace(**vars(ARGUMENTS), hf_deepspeed_config=SimpleNamespace(config=live))
    group = megalr.build_optimizer(megalr.parametrize(model(), config), config, training_args=args).param_groups[0]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (2e-3, (0.8, 0.9), 1e-7, 0.1)
    assert live["megalr"]["optimizer"]["params"]["lr"] == 2e-3 and live["zero_force_ds_cpu_optimizer"] is False
    assert config["megalr"]["optimizer"]["params"] == AUTO


def test_auto_without_training_arguments_says_what_to_pass():
    config = {"megalr": {"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}}
    with pytest.raises(UserError, match=r'params.lr is "auto"; write a number, or .* pass training_args='):
        megalr.build_optimizer(model(), config)


@pytest.mark.parametrize(
    ("config", "message"),
    [(None, "no deepspeed configuration"), ({"optimizer": {"type": "Muon"}}, 'move the section into "megalr"')],
)
def test_trainer_is_refused_an_optimizer_that_it_would_not_use(config, message):
    with pytest.raises(UserError, match=message):
        megalr.trainer_optimizer(SimpleNamespace(**vars(ARGUMENTS), deepspeed=config))


def test_state_of_another_optimizer_is_refused():
    net = megalr.parametrize(model(), LOW_RANK)
    other = torch.optim.AdamW(net.parameters()).state_dict()
    with pytest.raises(ValueError, match="not written by megalr"):
        megalr.build_optimizer(net, LOW_RANK).load_state_dict(other)


def test_loaded_state_keeps_the_configured_settings_and_the_saved_rates():
    net = megalr.parametrize(model(), LOW_RANK)
    saved = megalr.build_optimizer(net, LOW_RANK)
    for group in saved.param_groups:
        group["lr"] = 0.5
    changed = {**LOW_RANK, "optimizer": {"type": "AdamW", "params": {"betas": [0.5, 0.6], "weight_decay": 0.25}}}
    loaded = megalr.build_optimizer(net, changed)
    loaded.load_state_dict(saved.state_dict())
    assert all(group["betas"] == (0.5, 0.6) and group["lr"] == 0.5 for group in loaded.param_groups)
    assert {group["name"]: group["weight_decay"] for group in loaded.param_groups} == {
        "factors": 0.25,
        "trunk": 0.25,
        "norm": 0.0,
    }
