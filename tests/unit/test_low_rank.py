"""Low-rank layers: what they compute, how they start, which layers are exchanged, and the way back to dense."""

import pytest
import torch
from torch import nn

from megalr.config.settings import FullConfig, LowRankConfig
from megalr.errors import UserError
from megalr.layers import LowRankLinear, densify, factor_pairs, parametrize


class Block(nn.Module):
    def __init__(self, width=64, bias=False):
        super().__init__()
        self.attn = nn.Linear(width, width, bias=bias)
        self.mlp_up = nn.Linear(width, 3 * width, bias=bias)
        self.mlp_down = nn.Linear(3 * width, width, bias=bias)
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        return self.head(self.mlp_down(torch.relu(self.mlp_up(self.attn(x)))))


def test_layer_computes_the_scaled_product_with_bias():
    layer = parametrize(
        nn.ModuleDict({"attn": nn.Linear(6, 8)}), LowRankConfig(rank=3, alpha=12, target_modules=("attn",))
    )
    layer = layer["attn"]
    x = torch.randn(2, 5, 6)
    expected = x @ (4.0 * layer.B @ layer.A).T + layer.bias
    torch.testing.assert_close(layer(x), expected)


def test_targets_are_exchanged_and_nothing_else():
    model = parametrize(Block(), LowRankConfig(rank=4))
    assert isinstance(model.attn, LowRankLinear) and isinstance(model.mlp_up, LowRankLinear)
    assert isinstance(model.head, nn.Linear)
    assert list(factor_pairs(model)) == [("attn.B", "attn.A"), ("mlp_up.B", "mlp_up.A"), ("mlp_down.B", "mlp_down.A")]
    assert "attn.weight" not in model.state_dict()


def test_regular_expression_matches_whole_names():
    model = parametrize(Block(), LowRankConfig(rank=4, target_modules="mlp_.*"))
    assert isinstance(model.attn, nn.Linear) and isinstance(model.mlp_down, LowRankLinear)


@pytest.mark.parametrize("rank", [16, 64])
@pytest.mark.parametrize("alpha", [None, 1.0, 256.0])
def test_start_has_the_dense_variance_and_is_balanced(rank, alpha):
    torch.manual_seed(0)
    model = Block(width=256)
    std = {name: p.std().item() for name, p in model.named_parameters()}
    config = LowRankConfig(rank=rank, alpha=alpha)
    parametrize(model, config)
    for name in ("attn", "mlp_up", "mlp_down"):
        layer = model.get_submodule(name)
        product = layer.scale * layer.B @ layer.A
        assert product.std().item() == pytest.approx(std[f"{name}.weight"], rel=0.15)
        balance = layer.B.square().sum() / layer.A.square().sum()
        assert balance.item() == pytest.approx(1.0, rel=0.1)


def test_start_depends_on_seed_and_name_alone():
    def start(seed, dtype=torch.float32):
        torch.manual_seed(0)
        dense = Block().to(dtype)
        torch.manual_seed(17)  # the global state must not matter
        return parametrize(dense, LowRankConfig(rank=4), seed=seed)

    first, again, other = start(1), start(1), start(2)
    assert torch.equal(first.attn.B, again.attn.B)
    assert not torch.equal(first.attn.B, other.attn.B)
    assert not torch.equal(first.mlp_up.A[:, :64], first.attn.A)


def test_published_start_is_available():
    model = parametrize(Block(), LowRankConfig(rank=4, init="kaiming_uniform"))
    assert model.attn.A.abs().max() <= 1 / 64**0.5
    assert model.attn.B.abs().max() <= 1 / 4**0.5
    assert model.attn.B.abs().max() > 0.9 / 4**0.5


def test_meta_device_gives_shapes_only():
    with torch.device("meta"):
        model = Block()
    parametrize(model, LowRankConfig(rank=4))
    assert model.attn.B.is_meta and tuple(model.mlp_up.B.shape) == (192, 4)


def test_densify_gives_the_dense_model_back():
    model = parametrize(Block(bias=True), LowRankConfig(rank=4, alpha=8))
    dense = Block(bias=True)
    dense.load_state_dict(densify(model.state_dict(), LowRankConfig(rank=4, alpha=8)))
    x = torch.randn(3, 64)
    torch.testing.assert_close(dense(x), model(x))


def test_full_changes_nothing():
    model = Block()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    parametrize(model, FullConfig())
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LowRankConfig(rank=65), "rank is 65, but attn is a 64 x 64 matrix: write a rank of at most 64"),
        (LowRankConfig(rank=4, target_modules=("attn", "ffn")), "'ffn' matches no linear layer.*attn, mlp_up"),
        (LowRankConfig(rank=4, target_modules="att"), "regular expression for the whole name"),
        (LowRankConfig(rank=4, target_modules="(att"), "not a valid regular expression"),
    ],
)
def test_mistakes_are_told_before_anything_is_changed(config, message):
    model = Block()
    with pytest.raises(UserError, match=message):
        parametrize(model, config)
    assert all(not isinstance(m, LowRankLinear) for m in model.modules())


def test_shared_weight_is_refused():
    model = Block()
    model.mlp_copy = nn.Linear(64, 64, bias=False)
    model.mlp_copy.weight = model.attn.weight
    with pytest.raises(UserError, match=r"attn.weight and mlp_copy.weight are one shared weight"):
        parametrize(model, LowRankConfig(rank=4))


def test_zero_weight_is_refused():
    model = Block()
    nn.init.zeros_(model.attn.weight)
    with pytest.raises(UserError, match=r"attn.weight is all zeros"):
        parametrize(model, LowRankConfig(rank=4))
