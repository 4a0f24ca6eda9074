"""What is decided about tensor parallelism before there are processes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megalr import UserError
from megalr.hosts.autotp import check_tensor_parallel, planned_cuts, tensor_parallel_size
from megalr.hosts.tensor_parallel import in_whole, mark_cut, own_part, tensor_parallel_cuts
from megalr.layers.sltrain import part_of_support, random_support


@pytest.mark.parametrize(("section", "size"), [(None, 1), ({}, 1), ({"autotp_size": 0}, 1), ({"autotp_size": 4}, 4)])
def test_how_many_ranks_share_a_layer(section, size):
    assert tensor_parallel_size({"tensor_parallel": section}) == size


@pytest.mark.parametrize(
    "section", [2, {"autotp_size": "auto"}, {"autotp_size": -1}, {"autotp_size": 2.0}, {"autotp_size": True}]
)
def test_a_size_that_is_no_number_is_refused(section):
    with pytest.raises(UserError, match='write "tensor_parallel": {"autotp_size": 2}'):
        tensor_parallel_size({"tensor_parallel": section})


def test_what_so_many_ranks_cannot_share_is_refused():
    heads = SimpleNamespace(num_attention_heads=6, num_key_value_heads=2)
    check_tensor_parallel(heads, 2, 4)
    with pytest.raises(UserError, match="num_key_value_heads = 2, which so many ranks cannot share: .* divisor of 2"):
        check_tensor_parallel(heads, 3, 6)
    with pytest.raises(UserError, match="there are 3 processes: start a multiple of 2"):
        check_tensor_parallel(None, 2, 3)


def llama() -> LlamaForCausalLM:
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=11, **sizes))


def test_the_models_own_plan_says_what_is_cut_how():
    cuts = planned_cuts(llama(), {"tensor_parallel": {"autotp_size": 2}})
    rows, columns = ({n.rpartition(".")[2] for n, cut in cuts.items() if cut == way} for way in ("rows", "columns"))
    assert columns == {"o_proj", "down_proj"}
    assert rows == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
    assert cuts["lm_head"] == "gathered"


def test_the_json_may_say_it():
    spec = {"patterns": [".*up_proj.weight$"], "partition_type": "row"}
    section = {"autotp_size": 2, "partition_config": {"use_default_specs": False, "layer_specs": [spec]}}
    assert planned_cuts(llama(), {"tensor_parallel": section}) == {"model.layers.0.mlp.up_proj": "columns"}


def test_a_model_without_a_plan_needs_one():
    with pytest.raises(UserError, match='"partition_config"'):
        planned_cuts(torch.nn.Sequential(torch.nn.Linear(2, 2)), {"tensor_parallel": {"autotp_size": 2}})


def test_cuts_are_read_from_the_marks_of_autotp_and_of_megatron():
    ours, autotp, megatron, copy, bias = (torch.nn.Parameter(torch.zeros(2, 2)) for _ in range(5))
    mark_cut(ours, 1)
    autotp.ds_autotp_universal_checkpoint_meta = {"partition_dim": 0, "replicated": False}
    megatron.tensor_model_parallel, megatron.partition_dim = True, 1
    bias.ds_autotp_universal_checkpoint_meta = {"partition_dim": None, "replicated": True}
    given = {"ours": ours, "autotp": autotp, "megatron": megatron, "copy": copy, "bias": bias}
    assert tensor_parallel_cuts(given) == {"ours": 1, "autotp": 0, "megatron": 1}


@pytest.mark.parametrize(
    "mark",
    [
        {"sub_param_shape": (3, 2)},
        {"sub_param_shard_widths": [[1, 2]]},
        {"conversion": {"unsupported_reason": "heads of a rank are not behind each other"}},
        {"conversion": {"affine_map": {"pieces": []}}, "partition_sizes": None},
    ],
)
def test_fused_projections_are_refused(mark):
    fused = torch.nn.Parameter(torch.zeros(6, 2))
    fused.ds_autotp_universal_checkpoint_meta = {"partition_dim": 0, **mark}
    with pytest.raises(UserError, match="several pieces of qkv.weight, .* separate projections"):
        tensor_parallel_cuts({"qkv.weight": fused})


def test_a_cut_in_one_piece_may_be_described_as_well():
    part = torch.nn.Parameter(torch.zeros(6, 2))
    conversion = {"affine_map": {"pieces": []}, "unsupported_reason": None}
    part.ds_autotp_universal_checkpoint_meta = {
        "partition_dim": 0,
        "partition_sizes": (6, 6),
        "sub_param_shape": None,
        "conversion": conversion,
    }
    assert tensor_parallel_cuts({"weight": part}) == {"weight": 0}


def test_a_bias_is_marked_as_its_weight_is():
    weight, bias = (torch.nn.Parameter(torch.zeros(*shape)) for shape in ((4, 6), (4,)))
    mark_cut(weight, 0)
    with pytest.raises(UserError, match="up.weight is marked as cut by rows, and up.bias, .* is not: mark it"):
        tensor_parallel_cuts({"up.weight": weight, "up.bias": bias})
    mark_cut(bias, 0)
    assert tensor_parallel_cuts({"up.weight": weight, "up.bias": bias}) == {"up.weight": 0, "up.bias": 0}


def test_a_part_and_its_place_in_the_whole():
    whole = torch.arange(15.0).view(3, 5)
    part = torch.nn.Parameter(whole[:, 2:4].clone())
    assert own_part(part, whole) is whole and in_whole(part, whole) is whole  # not cut
    mark_cut(part, 1, (2, 5))
    assert torch.equal(own_part(part, whole), part)
    assert torch.equal(in_whole(part, part.detach()), torch.where((whole % 5 == 2) | (whole % 5 == 3), whole, 0.0))


@pytest.mark.parametrize("dim", [0, 1])
def test_parts_of_a_support_make_up_the_whole(dim):
    shape = (7, 5)
    places = random_support(shape, 12, seed=3)
    dense = torch.zeros(shape)
    dense.view(-1)[places.long()] = torch.arange(1.0, 13)
    found = []
    for first, size in ((0, 3), (3, shape[dim] - 3)):
        inside, chosen = part_of_support(places, shape[1], dim, first, size)
        part = torch.zeros((size, shape[1]) if dim == 0 else (shape[0], size))
        part.view(-1)[inside.long()] = chosen + 1.0
        assert torch.equal(part, dense.narrow(dim, first, size)) and torch.equal(inside, inside.sort().values)
        found.append(chosen)
    assert torch.equal(torch.cat(found).sort().values, torch.arange(12))
