"""What an export calls a dense model is one: every weight of it, in its shape, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from megalr.checkpoint.export.huggingface import fill
from megalr.errors import UserError
from megalr.layers import densify, parametrize
from megalr.layers.lora import LoraConfig
from tests.small_llama import small_llama


def test_parts_of_a_layer_that_belong_to_no_layer_are_not_called_dense():
    config = LoraConfig(rank=2, target_modules=("attn",))
    net = parametrize(nn.ModuleDict({"attn": nn.Linear(6, 6), "attn_out": nn.Linear(6, 6)}), config)
    state = {name: tensor for name, tensor in net.state_dict().items() if name != "attn.weight"}
    with pytest.raises(UserError, match=r"attn.[AB] has no attn.weight beside it"):
        densify(state, config)
    own = {"mixer.A": torch.zeros(2), "mixer.weight": torch.zeros(2)}
    assert densify(own, config).keys() == own.keys()


@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_held_against_the_model(tied):
    state = small_llama(tied=tied).state_dict()
    name = "model.layers.0.self_attn.q_proj.weight"

    def filled(weights):
        with torch.device("meta"):
            empty = small_llama(tied=tied)
        fill(empty, weights)
        return empty.state_dict()

    assert all(torch.equal(tensor, state[key]) for key, tensor in filled(dict(state)).items())
    with pytest.raises(UserError, match=rf"weights missing \['{name}'\], weights too many \[\]"):
        filled({key: tensor for key, tensor in state.items() if key != name})
    with pytest.raises(UserError, match=r"weights too many \['layers.0.self_attn.q_proj.B'\]"):
        filled({**state, "layers.0.self_attn.q_proj.B": torch.zeros(2)})
    with pytest.raises(UserError, match=rf"{name} is \(2, 3\), and the dense model has \("):
        filled({**state, name: torch.zeros(2, 3)})
