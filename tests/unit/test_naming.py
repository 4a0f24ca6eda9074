"""Names are those of the user's own classes, whatever wraps a model or parts of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import megalr
from megalr.checkpoint.manifest import read_manifest, write_manifest
from megalr.config.sections import OptimizerConfig
from megalr.errors import UserError
from megalr.layers import LowRankLinear
from megalr.naming import named_buffers, named_modules, named_parameters, plain_name, submodule, unwrapped
from megalr.optim.groups import check_names, parameter_groups
from tests import known_state

CONFIG = {
    "optimizer": {"type": "AdamW"},
    "megalr": {"parametrization": {"type": "low_rank", "rank": 2, "target_modules": ["attn"]}},
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.Linear(6, 6)
        self.module = nn.Linear(6, 6)  # a name that DistributedDataParallel uses as well
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x):
        return self.module(self.attn(x)) + self.mean


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.lm_head = nn.Linear(6, 4, bias=False)

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.lm_head(x)


def compiled(net):
    return torch.compile(net, backend="eager")


def in_parts(net):
    """Each block is checkpointed, and the first layer of one is compiled."""
    net.blocks[0] = checkpoint_wrapper(net.blocks[0])
    net.blocks[1].attn = compiled(net.blocks[1].attn)
    return net


def parallel(net):
    return nn.DataParallel(net)  # as DistributedDataParallel, without processes


def both(net):
    return compiled(parallel(in_parts(net)))


WRAPPERS = [compiled, in_parts, parallel, both]


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_names_are_those_of_the_plain_model(wrap):
    plain, wrapped = Net(), wrap(Net())
    assert [name for name, _ in named_parameters(wrapped)] == [name for name, _ in plain.named_parameters()]
    assert [name for name, _ in named_buffers(wrapped)] == [name for name, _ in plain.named_buffers()]
    assert [(n, type(m)) for n, m in named_modules(wrapped)] == [(n, type(m)) for n, m in plain.named_modules()]
    for name, module in named_modules(wrapped):
        assert submodule(wrapped, name) is module
    assert type(unwrapped(wrapped)) is Net
    assert plain_name(plain, "blocks.0.module.weight") == "blocks.0.module.weight"


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_layers_and_groups_are_those_of_the_plain_model(wrap):
    plain, wrapped = (megalr.parametrize(net, CONFIG) for net in (Net(), wrap(Net())))
    optimizers = [megalr.build_optimizer(net, CONFIG) for net in (plain, wrapped)]
    mine, theirs = ([(g.name, list(g.parameters)) for g in each.groups] for each in optimizers)
    assert mine == theirs
    assert sum(isinstance(module, LowRankLinear) for module in wrapped.modules()) == 2
    x = torch.randn(3, 6)
    assert torch.equal(plain(x), wrapped(x))


def test_an_optimizer_for_a_part_of_the_model_is_refused():
    net = megalr.parametrize(Net(), CONFIG)
    words = "0.attn is blocks.0.attn there. Give both of them the model that the engine gets"
    with pytest.raises(UserError, match=words):
        megalr.build_optimizer(net.blocks, CONFIG)
    whole = Net()
    megalr.parametrize(whole.blocks, CONFIG)
    megalr.build_optimizer(whole, CONFIG)


@pytest.mark.parametrize("other", [Net(), Net().blocks])
def test_names_are_held_against_the_engines_model(other):
    groups = parameter_groups(Net(), OptimizerConfig())
    with pytest.raises(UserError, match="weight is no parameter of the engine's model. Give megalr.build_optimizer"):
        check_names(groups, other)


def test_checkpoints_of_compiled_models_by_earlier_versions(tmp_path):
    content = known_state.content(1)
    content["numbers"] |= {"names": {"_orig_mod.head.weight": "_orig_mod.body.weight"}, "my_orig_mod.x": 1}
    kept = {key: content["numbers"][key] for key in ("optimizer", "my_orig_mod.x")}
    content["files"] = {"rank-00000.safetensors": {"bytes": 96, "header": 0}}
    piece = [[0], [1], "rank-00000.safetensors", 88, 0]
    vector = {"shape": [1], "dtype": "F32", "pieces": [piece]}
    other = {**vector, "pieces": [[[0], [1], "rank-00000.safetensors", 92, 0]]}
    content["tensors"] = {"weights/_orig_mod.body.weight": vector, "rule/layers._orig_mod.A/m": other}
    write_manifest(tmp_path, content)
    manifest = read_manifest(tmp_path)
    assert manifest.content["numbers"] == {"names": {"head.weight": "body.weight"}, **kept}
    assert manifest.tensors == {
        "weights/body.weight": {**vector, "stored": "weights/_orig_mod.body.weight"},
        "rule/layers.A/m": {**other, "stored": "rule/layers._orig_mod.A/m"},
    }
