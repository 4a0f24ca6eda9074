"""Compressed activations: gradients and what is saved, how the direction comes about, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

import megalr
from megalr.config.settings import MegalrConfig
from megalr.errors import UserError
from megalr.layers.velora import VeloraConfig, VeloraLinear, compress_activations
from megalr.rules.registry import RULES, hyperparameters
from tests.plain_velora import projection
from tests.unit.rule_runs import needed

SECTION = {"type": "velora", "groups": 4, "target_modules": ["mlp"]}


def layer_of(*, scale=1.0, bias=True, direction=True):
    torch.manual_seed(0)
    model = nn.ModuleDict({"mlp": nn.Linear(20, 7, bias=bias), "head": nn.Linear(20, 7)})
    compress_activations(model, VeloraConfig(groups=4, scale=scale, target_modules=("mlp",)))
    assert type(model["head"]) is nn.Linear
    if direction:
        model["mlp"].direction = functional.normalize(torch.randn(5), dim=0)
    return model["mlp"]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(20,), (6, 20), (2, 3, 20), (0, 20)])
def test_gradients_are_those_of_the_projected_input(shape, bias):
    layer, x = layer_of(scale=0.5, bias=bias), torch.randn(shape, requires_grad=True)
    y = layer(x)
    torch.testing.assert_close(y, functional.linear(x, layer.weight, layer.bias))
    grad = torch.randn_like(y)
    y.backward(grad)
    torch.testing.assert_close(x.grad, grad @ layer.weight)
    x_hat = projection(x.detach(), layer.direction).view(-1, 20)
    torch.testing.assert_close(layer.weight.grad, 0.5 * grad.view(-1, 7).T @ x_hat)
    if bias:
        torch.testing.assert_close(layer.bias.grad, grad.view(-1, 7).sum(0))


def test_what_is_saved_is_a_number_for_each_group():
    layer, saved = layer_of(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(torch.randn(6, 20, requires_grad=True))
    assert [tuple(t.shape) for t in saved] == [(6, 4)]


def test_evaluation_and_autocast():
    layer, x = layer_of(), torch.randn(6, 20)
    layer.eval()
    assert torch.equal(layer(x), functional.linear(x, layer.weight, layer.bias))
    layer.train()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x.requires_grad_())
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32


def test_the_first_update_is_exact_and_gives_the_direction():
    torch.manual_seed(0)
    model = nn.Sequential()
    model.mlp = nn.Linear(20, 7)
    config = {"optimizer": {"type": "Muon"}, "megalr": {"activations": SECTION}}
    megalr.parametrize(model, config)
    optimizer = megalr.build_optimizer(model, config)
    layer, micro = model.mlp, [torch.randn(3, 20), torch.randn(5, 20)]
    assert isinstance(layer, VeloraLinear) and list(model.state_dict()) == ["mlp.weight", "mlp.bias"]
    for x in micro:
        layer(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, torch.ones(8, 7).T @ torch.cat(micro))
    optimizer.step()
    expected = functional.normalize(torch.cat(micro).view(-1, 5).mean(0), dim=0)
    torch.testing.assert_close(layer.direction, expected)
    assert layer.total is None and optimizer.rule_calls == 1
    state = optimizer.state_dict()
    again = megalr.build_optimizer(model, config)
    layer.direction = None
    again.load_state_dict(state)
    assert torch.equal(layer.direction, state["megalr"]["tensors"]["directions/mlp"][0])


def test_a_pass_without_a_gradient_belongs_to_no_update():
    """As where memory runs out after a forward pass, and a Trainer tries again with a smaller batch."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"mlp": nn.Linear(20, 7)})
    config = {"optimizer": {"type": "Muon"}, "megalr": {"activations": SECTION}}
    megalr.parametrize(model, config)
    layer, x = model["mlp"], torch.randn(3, 20)
    layer.add(torch.randn(4, 20))  # as a backward pass for another optimizer does
    optimizer = megalr.build_optimizer(model, config)
    layer(torch.randn(4, 20))
    layer(x).sum().backward()
    optimizer.step()
    torch.testing.assert_close(layer.direction, functional.normalize(x.view(-1, 5).mean(0), dim=0))


def test_a_layer_that_is_used_later_has_its_direction_later():
    torch.manual_seed(0)
    model = nn.ModuleDict({"early_mlp": nn.Linear(20, 7), "late_mlp": nn.Linear(20, 7)})
    config = {"optimizer": {"type": "Muon"}, "megalr": {"activations": SECTION}}
    megalr.parametrize(model, config)
    optimizer = megalr.build_optimizer(model, config)
    early, late, x = model["early_mlp"], model["late_mlp"], torch.randn(3, 20)
    model.eval()  # nothing is saved for a gradient of the weight's shape that is compressed
    early(x).sum().backward()
    optimizer.step()
    assert early.direction is None is late.direction
    model.train()
    for layers, known in ([early], [True, False]), ([early, late], [True, True]):
        optimizer.zero_grad()
        sum(layer(x).sum() for layer in layers).backward()
        optimizer.step()
        assert [layer.direction is not None for layer in (early, late)] == known
    before = late.weight.detach().clone()
    late(x).sum().backward()
    optimizer.step()
    assert not torch.equal(late.weight, before)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"groups": 8}, "groups is 8, which does not divide the 20 inputs of mlp: write 5"),
        ({"target_modules": ["attn"]}, "'attn' matches no linear layer with a weight of its own"),
        ({"groups": 0}, "groups is 0; write a whole number"),
        ({"scale": 0.0}, "scale is 0.0; write a positive number"),
        ({"type": "velo"}, '"velora"'),
        ({"rank": 1}, 'megalr.activations has no key "rank"'),
    ],
)
def test_what_is_refused(section, message):
    model = nn.ModuleDict({"mlp": nn.Linear(20, 7)})
    with pytest.raises(UserError, match=message):
        megalr.parametrize(model, {"megalr": {"activations": {**SECTION, **section}}})


def test_a_layer_without_a_weight_of_its_own_is_refused():
    sections = {"parametrization": {"type": "low_rank", "rank": 2, "target_modules": ["mlp"]}, "activations": SECTION}
    with pytest.raises(UserError, match="'mlp' matches no linear layer with a weight of its own"):
        megalr.parametrize(nn.ModuleDict({"mlp": nn.Linear(20, 7)}), {"megalr": sections})


@pytest.mark.parametrize(("rule", "refused"), [("GaLoreAdamW", True), ("LDAdamW", True), ("APOLLO", False)])
def test_a_basis_of_more_directions_than_the_gradient_has_is_refused(rule, refused):
    content = {"megalr": {"activations": SECTION}, "optimizer": {"type": rule, "params": {"rank": 5}}}
    if refused:
        with pytest.raises(UserError, match="groups is 4, so that gradients have at most this rank"):
            MegalrConfig.from_json(content)
        content["megalr"]["activations"] = {**SECTION, "groups": 5}
    MegalrConfig.from_json(content)


# What takes a basis from the gradient, of which the default rank is 128.
BASED = {name for name, rule in RULES.items() if rule and {"rank", "projector"} <= set(hyperparameters(rule))}


@pytest.mark.parametrize("rule", RULES)
def test_any_rule_goes_with_as_many_groups_as_its_rank(rule):
    params = needed(rule)
    content = {"megalr": {"activations": {"type": "velora"}}, "optimizer": {"type": rule, "params": params}}
    if rule in BASED:
        with pytest.raises(UserError, match='groups is 32, .* basis of rank 128 .* write "groups" of at least'):
            MegalrConfig.from_json(content)
        content["optimizer"]["params"] = {**params, "rank": 32}
    MegalrConfig.from_json(content)


def test_a_model_that_was_not_prepared_is_refused():
    config = {"megalr": {"activations": SECTION}}
    assert MegalrConfig.from_json(config).activations == VeloraConfig(groups=4, target_modules=("mlp",))
    with pytest.raises(UserError, match="call megalr.parametrize"):
        megalr.build_optimizer(nn.ModuleDict({"mlp": nn.Linear(20, 7)}), config)
