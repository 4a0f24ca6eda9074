"""The projected layer: what it computes, what it saves, and how a dense model becomes one and comes back."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from megalr.config.settings import MegalrConfig, ProjectedConfig
from megalr.errors import UserError
from megalr.generation import next_generation
from megalr.layers import ProjectedLinear, densify, parametrize, projected_layers
from megalr.layers.projected import FullGradientSum

M, N, RANK = 12, 10, 3


def layer_of(side="input", compute="auto", *, bias=True, share=False, seed=0):
    """A layer with an R that is not zero, and the dense layer that it stands for."""
    torch.manual_seed(seed)
    dense = nn.Linear(N, M, bias=bias)
    model = nn.ModuleDict({"attn": copy.deepcopy(dense)})
    parametrize(model, ProjectedConfig(rank=RANK, side=side, compute=compute, target_modules=("attn",)))
    layer = model["attn"]
    nn.init.normal_(layer.R)
    with torch.no_grad():
        dense.weight.copy_(layer.materialized())
    return layer, dense


@pytest.mark.parametrize("compute", ["low_rank", "materialized", "rematerialized", "auto"])
@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("bias", [True, False])
def test_both_passes_are_the_dense_layers(side, compute, bias):
    layer, dense = layer_of(side, compute, bias=bias)
    x = torch.randn(2, 5, N, requires_grad=True)
    grad = torch.randn(2, 5, M)
    layer.full_gradient = FullGradientSum()
    y = layer(x)
    y.backward(grad)
    dx, x.grad = x.grad, None
    expected = dense(x)
    expected.backward(grad)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(dx, x.grad)
    full = dense.weight.grad
    torch.testing.assert_close(layer.full_gradient.value, full)
    torch.testing.assert_close(layer.R.grad, full @ layer.basis if side == "input" else layer.basis.T @ full)
    if bias:
        torch.testing.assert_close(layer.bias.grad, dense.bias.grad)
    assert layer.weight.grad is None and layer.basis.grad is None


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("compute", ["low_rank", "materialized", "rematerialized"])
def test_gradients_by_finite_differences(side, compute):
    layer, _ = layer_of(side, compute)
    layer.double()
    x = torch.randn(4, N, dtype=torch.float64, requires_grad=True)

    assert torch.autograd.gradcheck(layer, (x,))
    numeric = torch.zeros_like(layer.R)  # of R: the layer reads it from itself, so it is moved in place
    direction = torch.randn(4, M, dtype=torch.float64)
    with torch.no_grad():
        for index in range(layer.R.numel()):
            flat = layer.R.view(-1)
            old = flat[index].item()
            flat[index] = old + 1e-6
            above = (layer(x) * direction).sum()
            flat[index] = old - 1e-6
            below = (layer(x) * direction).sum()
            flat[index] = old
            numeric.view(-1)[index] = (above - below) / 2e-6
    (layer(x) * direction).sum().backward()
    torch.testing.assert_close(layer.R.grad, numeric, rtol=1e-6, atol=1e-6)


def saved_elements(function):
    """Elements of every tensor, parameters left out, that autograd saves while the function runs."""
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        function()
    return sizes


@pytest.mark.parametrize(("compute", "weights"), [("low_rank", []), ("rematerialized", []), ("materialized", [M * N])])
def test_the_input_side_saves_r_numbers_a_token(compute, weights):
    x = torch.randn(2, 5, N, requires_grad=True)
    layer, _ = layer_of("input", compute)
    assert saved_elements(lambda: layer(x)) == [10 * RANK, *weights]
    layer, _ = layer_of("output", compute)
    assert saved_elements(lambda: layer(x)) == [10 * N, *weights]


def test_auto_chooses_by_the_tokens():
    layer = ProjectedLinear(nn.Parameter(torch.empty(8, 4)), torch.empty(4, 2), None, side="right")
    # W costs 2 m n r = 128 a pass to form twice, and saves (2 m + n) r = 40 a token.
    assert [layer.materializes(tokens) for tokens in (1, 3, 4, 100)] == [False, False, True, True]
    layer = ProjectedLinear(nn.Parameter(torch.empty(8, 4)), torch.empty(8, 2), None, side="left")
    assert [layer.materializes(tokens) for tokens in (1, 4, 5)] == [False, False, True]
    for compute, expected in (("low_rank", False), ("rematerialized", True), ("materialized", True)):
        layer.compute = compute
        assert layer.materializes(1) == layer.materializes(1000) == expected


def llama(share=True, checkpointing=False, **section):
    torch.manual_seed(0)
    shape = {"hidden_size": 20, "intermediate_size": 33, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=61, num_key_value_heads=1))
    if checkpointing:
        model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": checkpointing == "reentrant"}
        )
    parametrize(model, ProjectedConfig(rank=4, share_basis=share, **section))
    for layer in projected_layers(model).values():
        nn.init.normal_(layer.R, std=0.02)
    return model


def test_a_shared_basis_has_one_latent(monkeypatch):
    """Three products x Q of the attention's inputs become one, two of the MLP's become one."""
    from megalr.layers import projected

    calls = []
    original = projected._latent
    monkeypatch.setattr(projected, "_latent", lambda x, basis: calls.append(basis) or original(x, basis))
    ids = torch.arange(12).view(2, 6)
    for share, expected in ((False, 14), (True, 8)):
        model, calls[:] = llama(share), []
        model(input_ids=ids)
        assert len(calls) == expected
        first = model.model.layers[0].self_attn
        assert (first.q_proj.basis is first.k_proj.basis is first.v_proj.basis) == share
        assert first.o_proj.basis is not first.q_proj.basis
        held = [layer.latents._held for layer in projected_layers(model).values() if layer.latents]
        assert all(x is None for x in held)


def test_a_shared_latent_is_of_the_basis_and_the_input_as_they_are():
    """Layers of a group that are called in different updates with one tensor, and around a change of it in place."""
    model = llama(True, compute="low_rank")
    attention, x = model.model.layers[0].self_attn, torch.randn(3, model.config.hidden_size)

    def expected():
        layer = attention.k_proj
        return x @ (layer.weight + layer.R @ layer.basis.T).T

    for layer in (attention.q_proj, attention.k_proj):
        nn.init.normal_(layer.R)
    attention.q_proj(x)
    with torch.no_grad():
        attention.k_proj.basis.copy_(attention.k_proj.basis.flip(0))
    next_generation()  # as an update or a load does
    torch.testing.assert_close(attention.k_proj(x), expected())
    with torch.inference_mode():
        x = x.clone()
        attention.q_proj(x)
        x.mul_(2)
        torch.testing.assert_close(attention.k_proj(x), expected())


@pytest.mark.parametrize("compute", ["low_rank", "materialized", "rematerialized"])
def test_a_shared_latent_changes_no_gradient(compute):
    ids = torch.arange(12).view(2, 6)
    shared = llama(True, compute=compute)
    alone = llama(False, compute=compute)
    for name, layer in projected_layers(alone).items():
        twin = projected_layers(shared)[name]
        layer.basis.data.copy_(twin.basis.data)
    results = []
    for model in (shared, alone):
        model(input_ids=ids, labels=ids).loss.backward()
        results.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, grad in results[0].items():
        torch.testing.assert_close(grad, results[1][name], msg=name)


@pytest.mark.parametrize("compute", ["auto", "materialized"])
@pytest.mark.parametrize("kind", ["reentrant", "not reentrant"])
def test_activation_checkpointing_changes_nothing(kind, compute):
    ids = torch.arange(12).view(2, 6)
    results = []
    for checkpointing in (False, kind):
        model = llama(True, checkpointing, compute=compute).train()
        for layer in projected_layers(model).values():
            layer.full_gradient = FullGradientSum()
        for _ in range(2):  # the second meets what the first may have left behind
            model(input_ids=ids, labels=ids).loss.backward()
        results.append([(p.R.grad, p.full_gradient.value) for p in projected_layers(model).values()])
    for (low, full), (low_again, full_again) in zip(*results, strict=True):
        torch.testing.assert_close(low, low_again)
        torch.testing.assert_close(full, full_again)


def test_layers_that_are_called_with_different_inputs_share_no_latent():
    model = llama(True)
    attention = model.model.layers[0].self_attn
    x, z = torch.randn(3, 20), torch.randn(3, 20)
    q, k = attention.q_proj(x), attention.k_proj(z)
    q.sum().backward()
    k.sum().backward()
    expected = torch.ones(3, 10).T @ (z @ attention.k_proj.basis)
    torch.testing.assert_close(attention.k_proj.R.grad, expected)


@pytest.mark.parametrize("compute", ["low_rank", "materialized", "rematerialized"])
@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("shape", [(0, N), (2, 0, N)])
def test_no_tokens(side, compute, shape):
    """As an expert of a mixture has them now and then."""
    layer, _ = layer_of(side, compute)
    x = torch.zeros(*shape[:-1], N, requires_grad=True)
    y = layer(x)
    assert y.shape == (*shape[:-1], M)
    y.sum().backward()
    assert x.grad.shape == x.shape and not layer.R.grad.any()


@pytest.mark.parametrize("compute", ["low_rank", "materialized", "rematerialized"])
@pytest.mark.parametrize("side", ["input", "output"])
def test_autocast(side, compute):
    """Weights in fp32, arithmetic in bf16, gradients in fp32 again; near to what fp32 gives."""
    layer, _ = layer_of(side, compute)
    x = torch.randn(2, 5, N)
    results = []
    for enabled in (False, True):
        layer.zero_grad()
        layer.full_gradient = FullGradientSum()
        ours = x.detach().clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = layer(ours)
        assert y.dtype == (torch.bfloat16 if enabled else torch.float32)
        y.float().square().sum().backward()
        results.append([y.float(), ours.grad, layer.R.grad.clone(), layer.bias.grad.clone(), layer.full_gradient.value])
    for exact, rounded in zip(*results, strict=True):
        assert rounded.dtype == torch.float32
        assert (rounded - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize("side", ["input", "output"])
def test_passes_that_make_no_gradient_of_r_are_not_collected(side):
    """The sum is that of the gradients in R.grad, whatever else ``torch.autograd.grad`` is asked for."""
    layer, _ = layer_of(side)
    x = torch.randn(4, N, requires_grad=True)
    layer.full_gradient = FullGradientSum()
    for inputs in ([x], [layer.R], [x, layer.R], [layer.bias]):
        torch.autograd.grad(layer(x).square().sum(), inputs)
    layer(x).square().sum().backward(inputs=[x])
    assert layer.full_gradient.value is None
    layer(x).square().sum().backward()
    layer(layer(x)[:, :1] * x).sum().backward(inputs=[layer.R])
    whole = layer.full_gradient.value
    low = whole @ layer.basis if side == "input" else layer.basis.T @ whole
    torch.testing.assert_close(low, layer.R.grad)


def test_inference_mode():
    ids = torch.arange(12).view(2, 6)
    model = llama(True, compute="low_rank")
    with torch.inference_mode():
        inferred = model(input_ids=ids).logits
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, inferred.clone())


def test_nothing_is_collected_in_evaluation():
    layer, _ = layer_of()
    layer.full_gradient = FullGradientSum()
    with torch.no_grad():
        layer(torch.randn(4, N))
    assert layer.full_gradient.value is None


@pytest.mark.parametrize("side", ["input", "std", "output"])
def test_the_start_is_the_dense_model_and_so_is_the_export(side):
    torch.manual_seed(0)
    model = nn.ModuleDict({"attn": nn.Linear(6, 9), "mlp": nn.Linear(9, 6), "head": nn.Linear(6, 4)})
    before = {name: w.detach().clone() for name, w in model.state_dict().items()}
    config = ProjectedConfig(rank=3, side=side)
    parametrize(model, config)
    assert isinstance(model["attn"], ProjectedLinear) and isinstance(model["head"], nn.Linear)
    for layer in (model["attn"], model["mlp"]):
        identity = layer.basis.T @ layer.basis
        torch.testing.assert_close(identity, torch.eye(3), atol=1e-6, rtol=0)
        assert not layer.R.any()
    sides = {"input": ("right", "right"), "output": ("left", "left"), "std": ("right", "left")}[side]
    assert (model["attn"].side, model["mlp"].side) == sides
    dense = densify(model.state_dict(), config)
    assert dense.keys() == before.keys()
    for name, weight in before.items():
        assert torch.equal(dense[name], weight), name


def test_the_start_depends_on_seed_and_name_alone():
    def bases(seed, names):
        model = nn.ModuleDict({name: nn.Linear(6, 6) for name in names})
        parametrize(model, ProjectedConfig(rank=2, target_modules=("attn",)), seed=seed)
        return {name: model[name].basis for name in names if "attn" in name}

    first = bases(0, ["attn_a", "attn_b"])
    assert torch.equal(first["attn_a"], bases(0, ["other", "attn_b", "attn_a"])["attn_a"])
    assert not torch.equal(first["attn_a"], first["attn_b"])
    assert not torch.equal(first["attn_a"], bases(1, ["attn_a"])["attn_a"])


def test_the_meta_device():
    with torch.device("meta"):
        model = nn.ModuleDict({"attn": nn.Linear(6, 9)})
    parametrize(model, ProjectedConfig(rank=3, target_modules=("attn",)))
    assert {n: tuple(p.shape) for n, p in model.named_parameters()} == {
        "attn.R": (9, 3),
        "attn.weight": (9, 6),
        "attn.basis": (6, 3),
        "attn.bias": (9,),
    }


def test_a_frozen_layer_stays_frozen():
    model = nn.ModuleDict({"attn": nn.Linear(6, 9, bias=False)})
    model["attn"].weight.requires_grad_(False)
    parametrize(model, ProjectedConfig(rank=3, target_modules=("attn",)))
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"rank": 0}, "rank is 0; write a whole number of at least 1"),
        ({"update_proj_gap": 0}, "update_proj_gap is 0; write a whole number of at least 1"),
        ({"side": "left"}, 'side is "left"; expected one of "input", "std", "output"'),
        ({"proj_type": "std"}, 'write "side": "std"'),
        ({"scale": 0.25}, "multiply optimizer.params.lr"),
        ({"side": "std", "share_basis": True}, 'share_basis needs a basis of the input: write "side": "input"'),
        ({"random_from": -1}, "random_from is -1; write a number of updates"),
        ({"alpha": 8}, 'has no key "alpha"'),
        ({"gap": 5}, 'has no key "gap"'),
    ],
)
def test_messages(section, message):
    with pytest.raises(UserError, match=message):
        MegalrConfig.from_json({"megalr": {"parametrization": {"type": "projected", **section}}})


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"optimizer": {"type": "Muon"}}, '"projected" factors cannot be trained with muon, because a refresh'),
        ({"momentum_reset": {"interval": 50, "scope": "all"}}, '"projected" layers reset their moments themselves'),
        ({"refactorization": {"interval": 5}}, "refactorization needs low-rank factors"),
    ],
)
def test_combinations_that_are_refused(more, message):
    section = {"parametrization": {"type": "projected", "rank": 2}}
    config = {"megalr": {**section, **{k: v for k, v in more.items() if k != "optimizer"}}}
    config |= {k: v for k, v in more.items() if k == "optimizer"}
    with pytest.raises(UserError, match=message):
        MegalrConfig.from_json(config)
