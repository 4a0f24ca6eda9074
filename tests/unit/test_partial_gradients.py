"""Which whole parameters have their gradients summed over tensor-parallel ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

import megalr
from megalr.hosts.autotp import planned_cuts
from megalr.hosts.partial_gradients import REGISTERED, partial_gradients, pass_over_frozen
from megalr.hosts.tensor_parallel import mark_cut
from megalr.layers.replacement import replaced_layers

Q, K = "model.layers.0.self_attn.q_norm.weight", "model.layers.0.self_attn.k_norm.weight"


def qwen3() -> Qwen3ForCausalLM:
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=11, head_dim=4, num_key_value_heads=2, **sizes))


def names(model: nn.Module, *targets: str, content: dict[str, Any] | None = None) -> list[str]:
    section = {"type": "low_rank", "rank": 2, "target_modules": list(targets)}
    megalr.parametrize(model, {"megalr": {"parametrization": section}}, other_optimizer=True)
    layers = replaced_layers(model)
    return list(partial_gradients(model, content or {}, planned_cuts(model, content or {}, layers), layers))


def test_those_that_the_plan_names_beside_layers_that_are_cut():
    assert names(qwen3(), "self_attn", "mlp") == [Q, K]


def test_beside_dense_layers_they_belong_to_who_cuts_these():
    assert names(qwen3(), "mlp") == []


def test_frozen_ones_and_parts_are_left_alone():
    model = qwen3()
    model.get_parameter(Q).requires_grad_(False)
    mark_cut(model.get_parameter(K), 0)
    assert names(model, "self_attn") == []


class Norms(nn.Module):
    """The norms of an attention in a module of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.q_norm, self.k_norm = nn.LayerNorm(4), nn.LayerNorm(4)


def specs(*summed: str) -> dict[str, Any]:
    layers = [
        {"patterns": [r".*\.[qkv]_proj\.weight$"], "partition_type": "column"},
        {"patterns": [r".*\.o_proj\.weight$"], "partition_type": "row"},
        *({"patterns": [each], "partition_type": "skip", "grad_allreduce": True} for each in summed),
    ]
    return {"tensor_parallel": {"partition_config": {"use_default_specs": False, "layer_specs": layers}}}


def test_deeper_modules_biases_and_parameters_of_the_attention_itself():
    model = qwen3()
    attention = model.model.layers[0].self_attn
    attention.norms, attention.temperature = Norms(), nn.Parameter(torch.ones(4))
    found = names(model, "self_attn", content=specs(r".*\.norms\.q_norm\.weight$", r".*\.temperature$"))
    inside = "model.layers.0.self_attn"
    assert found == [f"{inside}.temperature", f"{inside}.norms.q_norm.weight", f"{inside}.norms.q_norm.bias"]


@pytest.mark.parametrize("kind", ["skip", "column"])
def test_of_a_factorized_layer_it_is_refused(kind):
    content = specs()
    spec = {"patterns": [r".*\.[qkv]_proj\.weight$"], "partition_type": kind, "grad_allreduce": True}
    content["tensor_parallel"]["partition_config"]["layer_specs"].insert(0, spec)
    with pytest.raises(megalr.UserError, match=r'asks for "grad_allreduce" of model.*q_proj, which factorized'):
        names(qwen3(), "self_attn", content=content)


def test_autotp_passes_over_frozen_parameters():
    trained, frozen = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2), requires_grad=False)
    pass_over_frozen([trained, frozen])
    assert [getattr(parameter, REGISTERED, False) for parameter in (trained, frozen)] == [False, True]
