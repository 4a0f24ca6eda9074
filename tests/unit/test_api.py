"""What megalr.initialize passes on, and what it refuses before anything is built."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import megalr
from megalr.config.settings import read_json
from megalr.errors import UserError
from megalr.hosts.deepspeed_config import check_deepspeed_config, deepspeed_section
from megalr.hosts.tensor_parallel import check_earlier_groups
from megalr.layers.low_rank import LowRankLinear

LOW_RANK = {
    "train_batch_size": 4,
    "megalr": {"parametrization": {"type": "low_rank", "rank": 2, "target_modules": ["0"]}},
}


SCHEDULE = torch.optim.lr_scheduler.StepLR(torch.optim.SGD([torch.zeros(1)]), 2)  # of another optimizer


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


@pytest.mark.parametrize(("dtype", "rule"), [(torch.bfloat16, "Muon"), (torch.float64, "AdamW")])
def test_weights_that_are_not_fp32_are_refused(dtype, rule):
    net = model().to(dtype)
    optimizer = megalr.build_optimizer(net, {"optimizer": {"type": rule}})
    net(torch.ones(1, 6, dtype=dtype)).sum().backward()
    with pytest.raises(UserError, match=f"was given {str(dtype).removeprefix('torch.')} weights to update"):
        optimizer.step()


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
        ({}, {"model_parameters": []}, "takes no model_parameters= but model.parameters"),
        ({}, {"model_parameters": 5}, "takes no model_parameters= but model.parameters"),
        ({}, {"config_params": {}}, "config_params is another name of config"),
        ({}, {"colate_fn": list}, 'no argument "colate_fn"; did you mean "collate_fn"'),
        ({}, {"training_data": 5}, "training_data is 5: give a torch.utils.data.Dataset"),
        ({}, {"training_data": "text.txt"}, "training_data is 'text.txt': give"),
        ({}, {"lr_scheduler": 5}, "lr_scheduler is 5: give a function that makes a schedule"),
        ({}, {"lr_scheduler": SCHEDULE}, "lr_scheduler is .*StepLR.*: give a function"),
        ({}, {"collate_fn": 5}, "collate_fn is 5: give a function"),
        ({"megalr": {"rank": 3}}, {}, 'has no key "rank"'),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, {}, 'without ZeRO .* write "fp32", leave it out'),
        (
            {"train_micro_batch_size_per_gpu": 3},
            {},
            "train_batch_size is 4, .* train_micro_batch_size_per_gpu of 3 x 1 process: write 6",
        ),
        (
            {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4},
            {},
            "not train_micro_batch_size_per_gpu of 2 x gradient_accumulation_steps of 4 x 1 process: write 8",
        ),
        (
            {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1},
            {},
            "train_batch_size is 4, which is not .* of 1 x 1 process: write 2, or leave it out",
        ),
        ({"train_batch_size": "auto"}, {}, 'train_batch_size is "auto": write a whole number of at least 1'),
        ({"train_batch_size": None}, {}, "neither train_batch_size nor train_micro_batch_size_per_gpu"),
    ],
)
def test_what_cannot_work_is_refused_first(changes, arguments, message):
    net = model()
    with pytest.raises(UserError, match=message):
        megalr.initialize(model=net, config={**LOW_RANK, **changes}, **arguments)
    assert isinstance(net[0], nn.Linear)


@pytest.mark.parametrize("call", [megalr.parametrize, megalr.build_optimizer, megalr.initialize])
@pytest.mark.parametrize("given", [None, "model", nn.Linear, [nn.Linear(6, 4).weight]])
def test_a_model_is_a_module(call, given):
    with pytest.raises(UserError, match="model is .*: give the torch.nn.Module to train"):
        call(given, LOW_RANK)


def test_arguments_that_are_none_are_left_to_deepspeed(monkeypatch):
    def start(model, optimizer, content, **kwargs):
        raise KeyError(*kwargs)

    monkeypatch.setattr("megalr.api.start_engine", start)
    with pytest.raises(KeyError) as passed:
        megalr.initialize(model(), LOW_RANK, optimizer=None, lr_scheduler=None, training_data=[1])
    assert passed.value.args == ("training_data",)


@pytest.mark.parametrize(
    ("given", "is_taken"),
    [
        (lambda net: net.parameters(), True),
        (lambda net: list(net.parameters()), True),
        (lambda net: (p for p in net.parameters() if p.requires_grad), True),
        (lambda net: {p for p in net.parameters() if p.requires_grad}, True),
        (lambda net: net[0].parameters(), False),
        (lambda net: [{"params": list(net.parameters())}], False),
        (lambda net: dict(net.named_parameters()), False),
        (lambda net: net.named_parameters(), False),
        (lambda net: [*net.parameters(), nn.Parameter(torch.zeros(1))], False),
        (lambda net: model().parameters(), False),
        (lambda net: net[0].weight, False),
    ],
)
def test_the_models_own_parameters_may_be_given(monkeypatch, given, is_taken):
    """Most jobs pass them; they are trained anyway, and DeepSpeed does not get to see what layers have replaced."""

    def start(model, optimizer, content, **kwargs):
        raise KeyError(*kwargs)

    monkeypatch.setattr("megalr.api.start_engine", start)
    net = model()
    net[1].bias.requires_grad_(False)
    with pytest.raises(
        KeyError if is_taken else UserError, match=None if is_taken else "but model.parameters"
    ) as found:
        megalr.initialize(model=net, model_parameters=given(net), config=LOW_RANK)
    assert is_taken == (found.value.args == ()) == (not isinstance(net[0], nn.Linear))


@pytest.mark.parametrize("net", [None, [nn.Linear(6, 4).weight]])
def test_parameters_do_not_hide_what_the_model_is(net):
    with pytest.raises(UserError, match="takes no model_parameters="):
        megalr.initialize(net, LOW_RANK, model_parameters=model().parameters())


def test_batches_that_no_number_of_processes_can_share():
    check_deepspeed_config({"train_batch_size": 6, "train_micro_batch_size_per_gpu": 2}, None)
    with pytest.raises(UserError, match="train_batch_size is 3, .* not a multiple of train_micro_.* of 2: write 4"):
        check_deepspeed_config({"train_batch_size": 3, "train_micro_batch_size_per_gpu": 2}, None)


@pytest.mark.parametrize("given", ["int7", "int8", 7])
def test_gradients_add_up_in_a_known_type(given):
    with pytest.raises(UserError, match=f"grad_accum_dtype is .*{given}.*: write one of fp32, fp16, bf16"):
        check_deepspeed_config({"train_batch_size": 4, "data_types": {"grad_accum_dtype": given}}, 1)


def test_keys_of_data_types_that_work_are_read():
    content = {**LOW_RANK, "data_types": {"buffer_dtype": "fp32", "keep_in_fp32_modules": ["norm"]}}
    assert read_json(content) == content


def test_what_is_frozen_is_not_trained_by_factors_in_its_place():
    net = model()
    net[0].weight.requires_grad_(False)
    with pytest.raises(
        UserError, match=r'^0 is frozen .* "low_rank" puts new factors .*: leave it out of .*target_mod'
    ):
        megalr.parametrize(net, LOW_RANK)
    assert isinstance(net[0], nn.Linear)
    beside = {**LOW_RANK, "megalr": {"parametrization": {**LOW_RANK["megalr"]["parametrization"], "type": "lora"}}}
    assert not megalr.parametrize(net, beside)[0].B.requires_grad
    with pytest.raises(UserError, match="the model trains nothing: requires_grad is False for all"):
        megalr.build_optimizer(net.requires_grad_(False), beside)


def test_a_model_is_parametrized_once():
    net = megalr.parametrize(model(), LOW_RANK)
    for again in (megalr.parametrize, megalr.initialize):
        with pytest.raises(UserError, match="0 has been parametrized before: .* takes a dense model, once"):
            again(net, LOW_RANK)


def section(**changes):
    return {
        "megalr": {"parametrization": {"type": "low_rank", "rank": 2, "alpha": 8, "target_modules": ["0"], **changes}}
    }


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"alpha": 32}, "alpha 8.0 -> 32.0"),
        ({"rank": 3}, "rank 2 -> 3"),
        ({"type": "lora"}, 'type "low_rank" -> "lora"'),
        ({"target_modules": ["1"]}, r'target_modules \["0"\] -> \["1"\]'),
        ({"target_modules": "1"}, r'target_modules \["0"\] -> "1"'),
        (None, r'type "low_rank" -> "full"\. '),
    ],
)
def test_an_optimizer_is_given_the_configuration_that_the_layers_were_made_by(changes, difference):
    """Checkpoints keep the optimizer's, and an export would multiply by its scale."""
    net = megalr.parametrize(model(), section())
    with pytest.raises(UserError, match=f"^0 was parametrized with another .*then -> now.*{difference}"):
        megalr.build_optimizer(net, {} if changes is None else section(**changes))
    megalr.build_optimizer(net, section())


def test_two_parametrizations_of_one_model_need_equal_settings():
    net = megalr.parametrize(megalr.parametrize(model(), section()), section(alpha=32, target_modules=["1"]))
    for changes, name in (({}, "1"), ({"alpha": 32, "target_modules": ["1"]}, "0")):
        with pytest.raises(UserError, match=f"^{name} was parametrized with another"):
            megalr.build_optimizer(net, section(**changes))
    net = megalr.parametrize(megalr.parametrize(model(), section()), section(target_modules=["1"]))
    megalr.build_optimizer(net, section(target_modules=["0", "1"]))
    megalr.build_optimizer(net, section(target_modules="[01]"))


def test_a_layer_that_a_program_has_made_itself_is_its_own():
    net = model()
    net[0] = LowRankLinear(6, 6, 3)
    megalr.build_optimizer(net, section(alpha=32))


def test_an_engine_after_a_tensor_parallel_one_is_refused(monkeypatch):
    left = SimpleNamespace(get_tensor_model_parallel_world_size=lambda: 2)
    monkeypatch.setattr("megalr.hosts.tensor_parallel.told_of_parallelism", lambda: left)
    with pytest.raises(UserError, match="had 2 tensor-parallel ranks, and this one is to have 1: DeepSpeed keeps"):
        megalr.initialize(model(), LOW_RANK)
    check_earlier_groups(2)


def test_stage_3_takes_no_compiled_model():
    config = {**LOW_RANK, "zero_optimization": {"stage": 3}, "megalr": {}, "optimizer": {"type": "AdamW"}}
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
