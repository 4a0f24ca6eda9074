"""What a parameter is taken for."""

import pytest
import torch
from torch import nn

import megalr
from megalr.config.sections import OptimizerConfig
from megalr.optim.groups import parameter_groups
from megalr.roles import roles
from megalr.rules.muon import Muon


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.stacked = nn.Parameter(torch.zeros(3, 8, 8))
        self.router = nn.Parameter(torch.zeros(3, 8))
        self.kernel = nn.Parameter(torch.zeros(4, 4, 2, 2))
        self.temperature = nn.Parameter(torch.zeros(()))


def model(**more):
    layers = {"embed": nn.Embedding(9, 8), "attn": nn.Linear(8, 8), "mlp": nn.Linear(8, 8), "experts": Experts()}
    return nn.ModuleDict({**layers, "norm": nn.LayerNorm(8), "lm_head": nn.Linear(8, 9, bias=False), **more})


def test_every_trainable_parameter_has_one_role():
    net = model()
    net["mlp"].requires_grad_(False)
    assert roles(net) == {
        "embed.weight": "embedding",
        "attn.weight": "linear",
        "attn.bias": "vector",
        "experts.stacked": "stack",
        "experts.router": "matrix",
        "experts.kernel": "other",
        "experts.temperature": "vector",
        "norm.weight": "vector",
        "norm.bias": "vector",
        "lm_head.weight": "head",
    }


def test_a_head_that_is_the_embedding_is_both():
    net = model()
    net["lm_head"].weight = net["embed"].weight
    found = roles(net)
    assert found["embed.weight"] == "tied" and "lm_head.weight" not in found
    groups = {group.name: group for group in parameter_groups(net, OptimizerConfig(rule=Muon(), embeddings=True))}
    assert list(groups["head"].parameters) == ["embed.weight"] and groups["head"].rule is None


def test_a_model_may_name_its_head_otherwise():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.lm_head, self.decoder = nn.Linear(8, 8, bias=False), nn.Linear(8, 9, bias=False)

        def get_output_embeddings(self):
            return self.decoder

    assert roles(Named()) == {"lm_head.weight": "linear", "decoder.weight": "head"}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("low_rank", {"attn.B": "factor", "attn.A": "factor"}),
        ("sltrain", {"attn.B": "factor", "attn.A": "factor", "attn.values": "factor"}),
        ("mora", {"attn.M": "factor"}),
        ("projected", {"attn.R": "projected"}),
    ],
)
def test_what_stands_in_a_weights_place(kind, expected):
    net = megalr.parametrize(
        model(), {"megalr": {"parametrization": {"type": kind, "rank": 2, "target_modules": ["attn"]}}}
    )
    of_layer = {name: role for name, role in roles(net).items() if name.startswith("attn") and name != "attn.bias"}
    assert of_layer == expected
