"""CoLA and MoRA layers: what they compute, how they start, the way back to dense, and what cannot be combined."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from megalr.config.settings import MegalrConfig
from megalr.errors import UserError
from megalr.layers import densify, factor_names, factor_pairs, parametrize
from megalr.layers.cola import ColaConfig
from megalr.layers.mora import MoraConfig
from tests.references.parametrizations.mora import Mora

TARGETS = {"target_modules": ("attn",)}


def dense_of(m, n):
    torch.manual_seed(0)
    return nn.ModuleDict({"attn": nn.Linear(n, m)})


def test_cola_computes_the_auto_encoder():
    model = parametrize(dense_of(8, 6), ColaConfig(rank=3, **TARGETS))
    layer, x = model["attn"], torch.randn(2, 5, 6)
    latent = x @ layer.A.T
    torch.testing.assert_close(layer(x), latent * torch.sigmoid(latent) @ layer.B.T + layer.bias)
    assert list(factor_names(model)) == ["attn.B", "attn.A"] and not list(factor_pairs(model))


def test_cola_starts_as_published():
    layer = parametrize(dense_of(300, 200), ColaConfig(rank=100, **TARGETS))["attn"]
    for factor in (layer.B, layer.A):
        assert factor.std().item() == pytest.approx((100 * 500) ** -0.25, rel=0.02)
    assert (layer.B @ layer.A).std().item() == pytest.approx(500**-0.5, rel=0.05)


def test_cola_has_no_dense_weight():
    model = parametrize(dense_of(8, 6), ColaConfig(rank=3, **TARGETS))
    with pytest.raises(UserError, match='"cola" layers have no dense weight: between B and A is a non-linearity'):
        densify(model.state_dict(), ColaConfig(rank=3, **TARGETS))


SHAPES = [(8, 6), (6, 8), (7, 7), (20, 5), (5, 23), (12, 12)]


@pytest.mark.parametrize("mora_type", [1, 6])
@pytest.mark.parametrize("shape", SHAPES)
def test_mora_is_the_papers_matrices(shape, mora_type):
    rank = 2 if min(shape) > 5 else 1
    section = {"rank": rank, "mora_type": mora_type}
    dense = dense_of(*shape)
    model = parametrize(copy.deepcopy(dense), MoraConfig(**section, **TARGETS))
    layer, x = model["attn"], torch.randn(2, 5, shape[1], requires_grad=True)
    torch.testing.assert_close(layer(x), dense["attn"](x))  # M starts at zero
    nn.init.normal_(layer.M)
    plain = Mora("attn", {"weight": layer.weight, "M": layer.M, "bias": layer.bias.detach()}, section)
    torch.testing.assert_close(layer(x), plain(x))
    grad = torch.randn(2, 5, shape[0])
    got, expected = torch.autograd.grad(layer(x), layer.M, grad), torch.autograd.grad(plain(x), plain.M, grad)
    torch.testing.assert_close(got, expected)
    dense.load_state_dict(densify(model.state_dict(), MoraConfig(**section, **TARGETS)))
    torch.testing.assert_close(dense["attn"](x), layer(x))


def test_mora_trains_after_an_evaluation_in_inference_mode():
    layer = parametrize(dense_of(24, 26), MoraConfig(rank=3, **TARGETS))["attn"]  # a shape that no other test has
    x = torch.randn(3, 26)
    with torch.inference_mode():
        layer(x)
    layer(x.requires_grad_()).sum().backward()
    assert layer.M.grad is not None and layer(torch.empty(0, 26)).shape == (0, 24)


def test_mora_has_at_most_loras_parameters_and_more_rank():
    model = parametrize(dense_of(40, 24), MoraConfig(rank=4, **TARGETS))
    layer = model["attn"]
    assert layer.M.shape == (16, 16) and layer.M.numel() <= 4 * (40 + 24)
    nn.init.normal_(layer.M)
    change = densify(model.state_dict(), MoraConfig(rank=4, **TARGETS))["attn.weight"] - layer.weight
    assert torch.linalg.matrix_rank(change) >= 16  # LoRA has 4


def test_mora_is_never_larger_than_the_matrix():
    model = parametrize(dense_of(8, 6), MoraConfig(rank=6, mora_type=1, **TARGETS))
    assert model["attn"].M.shape == (6, 6)
    with pytest.raises(UserError, match="attn is a 1 x 6 matrix, too small for MoRA"):
        parametrize(dense_of(1, 6), MoraConfig(rank=1, **TARGETS))


@pytest.mark.parametrize("kind", ["cola", "mora"])
def test_what_is_refused_and_what_is_not(kind):
    def read(optimizer="AdamW", **sections):
        sections["parametrization"] = {"type": kind, "rank": 4, **sections.pop("section", {})}
        return MegalrConfig.from_json({"megalr": sections, "optimizer": {"type": optimizer}})

    with pytest.raises(UserError, match=f'needs low-rank factors B, A, and "{kind}" has'):
        read(refactorization={"interval": 5})
    with pytest.raises(UserError, match="no scale"):
        read(section={"alpha": 8})
    with pytest.raises(UserError, match=f'"{kind}" factors .* because it projects whole weights, and what'):
        read("GaLoreAdamW")
    assert read("Muon", momentum_reset={"interval": 50}).parametrization.type == kind


@pytest.mark.parametrize("mora_type", [1, 6])
def test_moras_size_as_published(mora_type):
    """The root of (m + n) r, rounded down as in the paper or to nearest as in the code; of type 6 an even number."""
    for m, n, r in [(20, 23, 2), (12, 12, 1), (20, 12, 5), (30, 25, 3)]:
        floor, nearest = int(((m + n) * r) ** 0.5), int(((m + n) * r) ** 0.5 + 0.5)
        even = 2 if mora_type == 6 else 1
        assert MoraConfig(rank=r, mora_type=mora_type).side((m, n)) == min(floor, m, n) // even * even
        config = MoraConfig(rank=r, mora_type=mora_type, published=True)
        assert config.side((m, n)) == min(nearest, m, n) // even * even
    section = {"rank": 3, "mora_type": mora_type, "published": True}
    layer = parametrize(dense_of(30, 25), MoraConfig(**section, **TARGETS))["attn"]
    assert layer.M.shape == ((13, 13) if mora_type == 1 else (12, 12))
    nn.init.normal_(layer.M)
    plain, x = (
        Mora("attn", {"weight": layer.weight, "M": layer.M, "bias": layer.bias.detach()}, section),
        torch.randn(4, 25),
    )
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-4, atol=1e-5)
