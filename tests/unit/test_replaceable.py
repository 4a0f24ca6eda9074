"""Which linear layers are not replaced, and what becomes of a model that reads the weight of one that is."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations, prune

import megalr
from megalr.errors import UserError
from megalr.layers import parametrize
from megalr.layers.cola import ColaConfig
from megalr.layers.lora import LoraConfig
from megalr.layers.loro import LoroConfig
from megalr.layers.low_rank import LowRankConfig, LowRankLinear
from megalr.layers.mora import MoraConfig
from megalr.layers.projected import ProjectedConfig
from megalr.layers.sltrain import SLTrainConfig
from megalr.layers.switchlora import SwitchLoraConfig
from megalr.layers.velora import VeloraConfig, VeloraLinear, compress_activations

TARGETS = {"target_modules": ("attn",)}
KEEPING = {"projected": ProjectedConfig, "lora": LoraConfig, "mora": MoraConfig, "switchlora": SwitchLoraConfig}
WITHOUT = (LowRankConfig, SLTrainConfig, ColaConfig, LoroConfig)


class Tripled(nn.Linear):
    def forward(self, x):
        return 3 * super().forward(x)


class CalledOtherwise(nn.Linear):
    def __call__(self, x):
        return 3 * super().__call__(x)


class Renamed(nn.Linear):
    """With nothing of its own that a replacement would lack."""


def with_own_forward(layer):
    plain = layer.forward
    layer.forward = lambda x: 3 * plain(x)


def with_buffer(layer):
    layer.register_buffer("mask", torch.ones(3))


def with_parameter(layer):
    layer.gain = nn.Parameter(torch.ones(3))


def with_child(layer):
    layer.norm = nn.LayerNorm(8)


def triple(module, inputs, output):
    return 3 * output


# What the user has put on a linear layer, and the words of the refusal.
ADDED = {
    "forward": (with_own_forward, "attn has a forward that was put on it alone"),
    "forward hook": (lambda layer: layer.register_forward_hook(triple), r"attn has hooks \(forward_hooks\)"),
    "pre-hook": (lambda layer: layer.register_forward_pre_hook(lambda *_: None), r"hooks \(forward_pre_hooks\)"),
    "backward hook": (lambda layer: layer.register_full_backward_hook(lambda *_: None), r"hooks \(backward_hooks\)"),
    "backward pre-hook": (
        lambda layer: layer.register_full_backward_pre_hook(lambda *_: None),
        r"hooks \(backward_pre_hooks\)",
    ),
    "state hook": (lambda layer: layer.register_state_dict_post_hook(lambda *_: None), r"hooks \(state_dict_hooks\)"),
    "buffer": (with_buffer, "attn has mask beside its weight and bias"),
    "parameter": (with_parameter, "attn has gain beside its weight and bias"),
    "child": (with_child, "attn has norm"),
    "weight_norm": (nn.utils.weight_norm, "attn has a weight that is computed from others"),
    "spectral_norm": (nn.utils.spectral_norm, "attn has a weight that is computed from others"),
    "prune": (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), "attn has a weight that is computed"),
    "pruned bias": (lambda layer: prune.l1_unstructured(layer, "bias", 0.5), "attn has a bias that is computed"),
}
# Likewise, but of no class that VeLoRA takes, or kept by it.
ADDED_TO_WEIGHT = {
    "parametrized weight_norm": (parametrizations.weight_norm, "attn has a weight that is computed from others"),
    "parametrized spectral_norm": (parametrizations.spectral_norm, "attn has a weight that is computed from others"),
    "hook": (lambda layer: layer.weight.register_hook(torch.zeros_like), "attn has hooks on its weight"),
    "accumulated": (
        lambda layer: layer.weight.register_post_accumulate_grad_hook(lambda _: None),
        "attn has hooks on its weight",
    ),
}


def model_with(layer):
    return nn.ModuleDict({"first_attn": nn.Linear(6, 8), "attn": layer})


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("added", ADDED | ADDED_TO_WEIGHT)
def test_what_is_on_a_layer_is_not_dropped(added):
    model = model_with(nn.Linear(6, 8))
    add, words = (ADDED | ADDED_TO_WEIGHT)[added]
    add(model["attn"])
    before = list(model.state_dict())
    with pytest.raises(UserError, match=f"{words}.*leave it out of megalr.parametrization.target_modules"):
        parametrize(model, LowRankConfig(rank=3, **TARGETS))
    assert list(model.state_dict()) == before and type(model["first_attn"]) is nn.Linear


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("added", ADDED)
def test_compressed_activations_drop_nothing_either(added):
    model = model_with(nn.Linear(6, 8))
    add, words = ADDED[added]
    add(model["attn"])
    before = list(model.state_dict())
    with pytest.raises(UserError, match=f"{words}.*leave it out of megalr.activations.target_modules"):
        compress_activations(model, VeloraConfig(groups=2, **TARGETS))
    assert list(model.state_dict()) == before and type(model["first_attn"]) is nn.Linear
    assert compress_activations(model, VeloraConfig(groups=2, target_modules="first_attn"))  # others do not matter


def test_compressed_activations_keep_hooks_on_the_weight():
    model = model_with(nn.Linear(6, 8))
    model["attn"].weight.register_hook(torch.zeros_like)
    layer = compress_activations(model, VeloraConfig(groups=2, **TARGETS))["attn"]
    layer.direction = functional.normalize(torch.ones(3), dim=0)
    layer(torch.randn(5, 6)).sum().backward()
    assert isinstance(layer, VeloraLinear) and not layer.weight.grad.any()


def test_hooks_on_a_bias_stay_with_it():
    model = model_with(nn.Linear(6, 8))
    model["attn"].bias.register_hook(torch.zeros_like)
    parametrize(model, LowRankConfig(rank=3, **TARGETS))
    model["attn"](torch.randn(5, 6)).sum().backward()
    assert not model["attn"].bias.grad.any()


@pytest.mark.parametrize("kind", [Tripled, CalledOtherwise])
def test_a_class_that_computes_something_else(kind):
    with pytest.raises(UserError, match=f"attn is a {kind.__name__}, which computes something of its own"):
        parametrize(model_with(kind(6, 8)), LowRankConfig(rank=3, **TARGETS))


def test_a_class_that_computes_the_same_is_replaced():
    model = parametrize(model_with(Renamed(6, 8)), LowRankConfig(rank=3, **TARGETS))
    assert isinstance(model["attn"], LowRankLinear)


@pytest.mark.parametrize(
    ("module", "target", "reader"),
    [
        (lambda: nn.MultiheadAttention(8, 2), "out_proj", "MultiheadAttention reads its weight"),
        (lambda: nn.TransformerEncoderLayer(8, 2, 16), "linear1", "TransformerEncoderLayer reads its weight in eval"),
        (lambda: nn.TransformerEncoderLayer(8, 2, 16), "linear2", "TransformerEncoderLayer reads its weight in eval"),
        (lambda: nn.TransformerEncoderLayer(8, 2, 16), "out_proj", "MultiheadAttention reads its weight"),
    ],
)
def test_layers_of_which_torch_reads_the_weight(module, target, reader):
    model = nn.ModuleDict({"block": module()})
    with pytest.raises(UserError, match=rf"{target} cannot be replaced: {reader}.*leave it out of megalr\.param"):
        parametrize(model, LoraConfig(rank=3, target_modules=(target,)))


def test_layers_of_a_decoder_compute_the_same_in_evaluation():
    torch.manual_seed(0)
    model = nn.ModuleDict({"block": nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0)})
    parametrize(model, LoraConfig(rank=3, target_modules=("linear",)))
    nn.init.normal_(model["block"].linear1.B)
    x = torch.randn(3, 2, 8)
    with torch.no_grad():
        torch.testing.assert_close(model["block"].eval()(x, x), model["block"].train()(x, x))


class Reader(nn.Module):
    """Computes with a layer, with its weight alone, or with neither; and may look at the weight's dtype."""

    def __init__(self, how):
        super().__init__()
        self.attn, self.head, self.how = nn.Linear(6, 6), nn.Linear(6, 4), how

    def forward(self, x):
        if self.how == "weight" and self.training:
            x = functional.linear(x, self.attn.weight)
        elif self.how != "nothing":
            x = self.attn(x.to(self.attn.weight.dtype))
        return self.head(x)


def reader(how, kind):
    torch.manual_seed(0)
    config = {
        "megalr": {"parametrization": {"type": kind, "rank": 3, **TARGETS}},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.1}},
    }
    model = megalr.parametrize(Reader(how), config)
    return model, megalr.build_optimizer(model, config)


def update(model, optimizer):
    model(torch.randn(5, 6)).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("kind", KEEPING)
def test_a_model_that_computes_with_the_frozen_weight_alone(kind):
    model, optimizer = reader("weight", kind)
    model.eval()(torch.randn(5, 6))  # calls the layer, which hides nothing
    with torch.no_grad():
        model.train().how = "layer"
        model(torch.randn(5, 6))
    model.how = "weight"
    before = model.attn.frozen_weight.clone()
    with pytest.raises(UserError, match=r"never called.*in training: attn\..*leave it out of megalr\.parametrization"):
        update(model, optimizer)
    assert torch.equal(model.attn.frozen_weight, before)


@pytest.mark.parametrize("kind", KEEPING)
def test_a_model_that_looks_at_the_dtype_alone(kind):
    model, optimizer = reader("layer", kind)
    factor = next(name for name, p in model.attn.named_parameters() if p.requires_grad)
    before = model.attn.get_parameter(factor).clone()
    for _ in range(2):
        update(model, optimizer)
    assert not torch.equal(model.attn.get_parameter(factor), before)


@pytest.mark.parametrize("kind", KEEPING)
def test_a_layer_that_is_not_used_may_be_looked_at(kind):
    model, optimizer = reader("nothing", kind)
    with torch.no_grad():
        assert model.attn.weight.norm() > 0
    model.eval().attn.weight.norm()
    before = model.head.weight.clone()
    update(model.train(), optimizer)
    assert not torch.equal(model.head.weight, before)


@pytest.mark.parametrize("kind", KEEPING)
def test_the_frozen_weight_is_a_parameter_like_any(kind):
    dense = model_with(nn.Linear(6, 8))
    model = parametrize(copy.deepcopy(dense), KEEPING[kind](rank=3, **TARGETS))
    weight = model.get_parameter("attn.weight")
    assert torch.equal(weight, dense["attn"].weight) and not weight.requires_grad and hasattr(model["attn"], "weight")
    assert (
        model["attn"].weight is weight is model["attn"].frozen_weight is dict(model.named_parameters())["attn.weight"]
    )
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other["attn"].weight = nn.Parameter(torch.zeros(8, 6), requires_grad=False)
        assert not other["attn"].frozen_weight.any() and not other.state_dict()["attn.weight"].any()
    assert torch.equal(model["attn"].frozen_weight, dense["attn"].weight)


@pytest.mark.parametrize("config", WITHOUT)
def test_a_layer_without_a_weight_says_so(config):
    model = parametrize(model_with(nn.Linear(6, 8)), config(rank=3, **TARGETS))
    assert not hasattr(model["attn"], "weight") and getattr(model["attn"], "weight", None) is None
    words = f"^attn is a {type(model['attn']).__name__}, which has no `weight`.*leave it out of megalr.parametrization"
    with pytest.raises(UserError, match=words):
        _ = model["attn"].weight
    with pytest.raises(AttributeError, match="has no attribute 'height'") as found:
        _ = model["attn"].height
    assert not isinstance(found.value, UserError)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize("kind", ["low_rank", *KEEPING])
def test_layers_compile_as_before(kind):
    model = Reader("layer")
    parametrize(model, {**KEEPING, "low_rank": LowRankConfig}[kind](rank=3, **TARGETS))
    run = model if kind != "low_rank" else nn.Sequential(model.attn, model.head)
    x = torch.randn(5, 6)
    torch.compiler.reset()
    compiled = torch.compile(run, backend="eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            y = compiled(x)
    torch.testing.assert_close(y, run(x))
    assert kind == "low_rank" or (model.attn.was_called and not model.attn.is_bypassed)
