"""The sparse plus low-rank layer: what it computes and saves, where its values are, and the way back to dense."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from megalr.config.settings import MegalrConfig
from megalr.errors import UserError
from megalr.layers import SLTrainLinear, densify, factor_names, factor_pairs, parametrize
from megalr.layers.sltrain import SLTrainConfig, random_support
from megalr.ops import refactorize_

M, N, RANK = 37, 20, 3


def layer_of(*, bias=True, density=0.1, seed=0, m=M, n=N, init="variance_matched"):
    torch.manual_seed(0)
    model = nn.ModuleDict({"attn": nn.Linear(n, m, bias=bias)})
    config = SLTrainConfig(rank=RANK, alpha=6.0, density=density, init=init, target_modules=("attn",))
    return parametrize(model, config, seed=seed)["attn"]


def plain_weight(layer):
    """s B A + S by autograd."""
    sparse = torch.zeros(layer.out_features * layer.in_features, dtype=layer.values.dtype)
    sparse = sparse.index_put((layer.support.long(),), layer.values)
    return 2.0 * layer.B @ layer.A + sparse.view(layer.out_features, layer.in_features)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(N,), (7, N), (2, 5, N), (2, 3, 4, N)])
def test_both_passes_are_autograds_of_the_formula(bias, shape):
    layer = layer_of(bias=bias)
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    grad = torch.randn_like(y)
    expected = nn.functional.linear(x, plain_weight(layer), layer.bias)
    torch.testing.assert_close(y, expected)
    wanted = [x, *layer.parameters()]
    for got, right in zip(
        torch.autograd.grad(y, wanted, grad), torch.autograd.grad(expected, wanted, grad), strict=True
    ):
        torch.testing.assert_close(got, right)


def test_gradients_by_finite_differences():
    layer = layer_of(m=9, n=7).double()
    x = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *layer.parameters()))


def test_frozen_parts_and_inputs_get_no_gradient():
    layer = layer_of()
    layer.A.requires_grad_(False)
    layer(torch.randn(3, N)).sum().backward()
    assert layer.A.grad is None and layer.values.grad is not None


def test_activation_checkpointing_and_autocast():
    layer = layer_of()
    x = torch.randn(6, N, requires_grad=True)
    (plain,) = torch.autograd.grad(layer(x).square().sum(), layer.values)
    (again,) = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).square().sum(), layer.values)
    assert torch.equal(plain, again)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    (low,) = torch.autograd.grad(y.float().square().sum(), layer.values)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, plain, rtol=5e-2, atol=5e-2 * plain.abs().max().item())


def test_inputs_without_tokens_and_inference_mode():
    layer = layer_of()
    layer(torch.empty(0, N, requires_grad=True)).sum().backward()
    assert not layer.values.grad.any() and not layer.B.grad.any()
    with torch.inference_mode():
        x = torch.randn(3, N)
        torch.testing.assert_close(layer(x), nn.functional.linear(x, plain_weight(layer), layer.bias))


def test_only_the_input_is_saved():
    layer, saved = layer_of(), []
    x = torch.randn(5, N, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    assert len(saved) == 1 and saved[0].data_ptr() == x.data_ptr()


class Largest(TorchDispatchMode):
    """Counts new tensors as large as the weight, by the operation that makes them."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.found = numel, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.numel() >= self.numel and not func.is_view:
            self.found.append(str(func))
        return out


def test_no_gradient_of_the_whole_weight_exists():
    layer = layer_of(m=64, n=48)
    y = layer(torch.randn(2, 48))  # fewer elements than the weight has; no gradient of x, so no weight either
    with Largest(64 * 48) as largest:
        y.sum().backward()
    assert largest.found == []


def test_support_is_a_uniform_set_of_places_that_seed_and_name_choose():
    layer = layer_of()
    assert layer.support.dtype == torch.int32 and layer.support.numel() == round(0.1 * M * N)
    assert layer.support.diff().min() > 0 and layer.support[0] >= 0 and layer.support[-1] < M * N
    torch.manual_seed(5)  # the global state must not matter
    assert torch.equal(layer.support, layer_of().support)
    assert not torch.equal(layer.support, layer_of(seed=1).support)
    counts = torch.zeros(30)
    for seed in range(4000):
        counts[random_support((5, 6), 12, seed).long()] += 1
    expected = 4000 * 12 / 30
    assert (counts - expected).abs().max() < 5 * (expected * 0.6) ** 0.5
    assert random_support((5, 6), 29, 0).unique().numel() == 29


def test_places_are_not_saved_but_follow_the_checkpoint():
    layer, other = layer_of(), layer_of(seed=1)
    state = copy.deepcopy(layer.state_dict())
    assert "support" not in state
    x = torch.randn(3, N)
    other.load_state_dict(state)
    assert torch.equal(other.support, layer.support)
    torch.testing.assert_close(other(x), layer(x))
    (grad,) = torch.autograd.grad(other(x).sum(), other.values)
    (expected,) = torch.autograd.grad(layer(x).sum(), layer.values)
    assert torch.equal(grad, expected)


def test_densify_gives_the_dense_layer_whatever_the_states_dtype():
    config = SLTrainConfig(rank=RANK, alpha=6.0, density=0.1, target_modules=("attn",))
    layer = layer_of()
    state = {f"attn.{key}": value.float() for key, value in layer.state_dict().items()}  # as zero_to_fp32 has it
    dense = densify(state, config)
    assert dense.keys() == {"attn.weight", "attn.bias"}
    torch.testing.assert_close(dense["attn.weight"], plain_weight(layer))


def test_starts():
    published = layer_of(init="kaiming_uniform", m=200, n=100)
    assert not published.B.any()
    for trained in (published.A, published.values):
        assert 0.95 / 10 < trained.abs().max() <= 1 / 10
    torch.manual_seed(0)
    dense = nn.Linear(100, 200).weight.std().item()
    matched = layer_of(m=200, n=100)
    assert matched.values.std().item() == pytest.approx(dense, rel=0.1)
    assert plain_weight(matched).std().item() == pytest.approx(dense, rel=0.1)


def test_refactorization_finds_the_pair_and_leaves_the_sparse_part_alone():
    model = nn.ModuleDict({"attn": layer_of()})
    assert list(factor_pairs(model)) == [("attn.B", "attn.A")]
    assert list(factor_names(model)) == ["attn.B", "attn.A", "attn.values"]
    layer, values = model["attn"], model["attn"].values.clone()
    before = plain_weight(layer).detach()
    refactorize_([layer.B.data], [layer.A.data], [], "keep")
    torch.testing.assert_close(plain_weight(layer), before)
    torch.testing.assert_close(layer.B.T @ layer.B, layer.A @ layer.A.T, atol=1e-6, rtol=1e-4)
    assert torch.equal(values, layer.values)


def test_meta_device_gives_shapes_only():
    with torch.device("meta"):
        model = nn.ModuleDict({"attn": nn.Linear(N, M)})
    layer = parametrize(model, SLTrainConfig(rank=3, target_modules=("attn",)))["attn"]
    assert layer.values.is_meta and layer.values.shape == (round(0.03 * M * N),)


def test_mistakes():
    section = {"type": "sltrain", "rank": 4}
    for density in (0.0, 1.0, -0.1):
        with pytest.raises(UserError, match="density is .*; write a share"):
            MegalrConfig.from_json({"megalr": {"parametrization": {**section, "density": density}}})
    for rule, message in (("GaLoreAdamW", "cannot be trained with galore"),):
        with pytest.raises(UserError, match=message):
            MegalrConfig.from_json({"megalr": {"parametrization": section}, "optimizer": {"type": rule}})
    with torch.device("meta"):
        model = nn.ModuleDict({"attn": nn.Linear(2**16, 2**15)})
    with pytest.raises(UserError, match="too large for indices of 32 bits"):
        parametrize(model, SLTrainConfig(rank=4, target_modules=("attn",)))
    assert isinstance(layer_of(), SLTrainLinear)
