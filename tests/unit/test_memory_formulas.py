"""The memory formulas, on examples small enough to work out by hand and on the shipped shapes; measuring."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from megalr.config.settings import LowRankConfig
from megalr.layers import parametrize
from megalr.layers.projected import ProjectedConfig
from megalr.layers.relora import ReloraConfig
from megalr.layers.sltrain import SLTrainConfig
from megalr.layers.switchlora import SwitchLoraConfig
from megalr.memory.formulas import (
    ParameterRecord,
    RankBytes,
    buffer_bytes,
    deepspeed_bytes,
    measured_bytes,
    merged_shapes,
    paper_bytes,
    records,
)
from megalr.memory.peak import peak_memory_bytes
from tests.processes import python, run

MODELS = Path(__file__).parents[2] / "launchers" / "models"

# 15 + 4 and 7 elements. In a world of 3 the groups are padded to 24 and 12: a rank's parts are 8 and 4 long.
# Rank 0 holds some of the 15 and of the 7, rank 1 some of all three, rank 2 some of the 4 and none of the 7.
GROUPS = [[(3, 5), (4,)], [(7,)]]


def in_elements(weights, gradients, masters, state, size=4):
    """Numbers of elements; ``size`` is that of a weight and of a gradient."""
    return RankBytes(weights=size * weights, gradients=size * gradients, masters=4 * masters, optimizer_state=4 * state)


@pytest.mark.parametrize(
    ("stage", "rank", "expected"),
    [
        (0, 1, in_elements(26, 26, 0, 52)),
        (1, 1, in_elements(36, 26, 12, 24)),
        (2, 0, in_elements(36, 15 + 7, 12, 24)),
        (2, 1, in_elements(36, 15 + 4 + 7, 12, 24)),
        (2, 2, in_elements(36, 4, 12, 24)),
        (3, 1, in_elements(10 + 6, 10, 10, 20)),  # parts of 5, 2 and 3; the 4 are kept gathered, padded to 6
    ],
)
def test_an_fp32_model_by_hand(stage, rank, expected):
    assert deepspeed_bytes(GROUPS, stage=stage, world_size=3, rank=rank, persistence_threshold=4) == expected


@pytest.mark.parametrize(
    ("stage", "rank", "expected"),
    [
        (0, 0, in_elements(26, 26, 26, 52, size=2)),
        (1, 0, in_elements(36, 26, 12, 24, size=2)),
        (2, 2, in_elements(36, 4, 12, 24, size=2)),
        (3, 2, in_elements(10 + 6, 10, 10, 20, size=2)),
    ],
)
def test_a_bf16_model_by_hand(stage, rank, expected):
    options = {"stage": stage, "world_size": 3, "rank": rank, "persistence_threshold": 4}
    assert deepspeed_bytes(GROUPS, dtype=torch.bfloat16, **options) == expected


@pytest.mark.parametrize(
    ("stage", "rank", "gradients"),
    [
        (1, 0, 2 * 26 + 4 * 36),
        (2, 1, 4 * (8 + 4)),
        (2, 2, 4 * 8),  # only padding of the second group is here
        (3, 0, 4 * 10),
    ],
)
def test_fp32_gradients_of_a_bf16_model(stage, rank, gradients):
    options = {"stage": stage, "world_size": 3, "rank": rank, "dtype": torch.bfloat16}
    assert deepspeed_bytes(GROUPS, gradient_dtype=torch.float32, **options).gradients == gradients


@pytest.mark.parametrize(
    ("stage", "rank", "elements"),
    [(0, 2, 14 + 5), (1, 1, 5 + 2), (3, 0, 5 + 2), (3, 2, 4 + 1)],  # in a world of 3: 5, 5 and 4 of 14, 2, 2 and 1 of 5
)
def test_remainders_by_hand(stage, rank, elements):
    options = {"stage": stage, "world_size": 3, "rank": rank, "frozen": [(2, 7), (1, 5), (3, 3)]}
    both = [
        deepspeed_bytes(GROUPS, dtype=torch.bfloat16, merged=merged, **options).optimizer_state
        for merged in ([(2, 7), (1, 5)], ())
    ]
    assert both[0] - both[1] == 2 * elements
    assert deepspeed_bytes(GROUPS, merged=[(2, 7)], **options) == deepspeed_bytes(GROUPS, **options)  # fp32


@pytest.mark.parametrize("kind", [ReloraConfig, SwitchLoraConfig, ProjectedConfig])
def test_which_weights_will_have_remainders(kind):
    model = nn.ModuleDict({"attn": nn.Linear(6, 8), "frozen_attn": nn.Linear(6, 9), "head": nn.Linear(6, 7)})
    model["frozen_attn"].weight.requires_grad_(False)
    section = kind(rank=2, target_modules=("attn",), merge_rounding="remainder")
    parametrize(model, section)
    assert merged_shapes(model, section) == [(8, 6)]
    assert merged_shapes(model, dataclasses.replace(section, merge_rounding="nearest")) == []
    assert merged_shapes(model, LowRankConfig(rank=2)) == []


def test_a_world_of_one_gathers_nothing():
    counted = deepspeed_bytes(GROUPS, stage=3, world_size=1)
    assert counted == in_elements(26, 26, 26, 52)
    assert counted.total == 4 * (26 + 26 + 26 + 52)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stage": 4, "world_size": 1}, "stage is 4"),
        ({"stage": 2, "world_size": 2, "rank": 2}, "ranks 0 to 1"),
        (
            {"stage": 0, "world_size": 1, "dtype": torch.bfloat16, "gradient_dtype": torch.float32},
            "stage 0 keeps",
        ),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        deepspeed_bytes(GROUPS, **options)


@pytest.mark.parametrize(("size", "rank"), [("60m", 128), ("350m", 256), ("1b", 512)])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_shipped_low_rank_shapes_up_to_padding(size, rank, world_size):
    """Stage 2 in bf16 is 2N + 12N / P, stage 3 is 14N / P, but for the padding and the gathered norms."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig.from_json_file(MODELS / f"{size}.json"))
    listed = records(parametrize(model, LowRankConfig(rank=rank)))
    groups = [[r.shape for r in listed if len(r.shape) == dim] for dim in (2, 1)]
    matrices, norms = (sum(r.numel for r in listed if len(r.shape) == dim) for dim in (2, 1))
    count = matrices + norms

    two = deepspeed_bytes(groups, stage=2, world_size=world_size, dtype=torch.bfloat16)
    assert 0 <= two.weights - 2 * count < len(groups) * 2 * 2 * world_size
    assert 0 <= two.masters + two.optimizer_state - 12 * count / world_size < len(groups) * 12 * 2

    three = deepspeed_bytes(
        groups,
        stage=3,
        world_size=world_size,
        dtype=torch.bfloat16,
        persistence_threshold=matrices_are_larger(groups),
    )
    gathered = 2 * norms if world_size > 1 else 0
    assert 0 <= three.weights - gathered - 2 * count / world_size < len(listed) * 2 * (1 + world_size)
    assert 0 <= three.masters + three.optimizer_state - 12 * count / world_size < len(listed) * 12


def matrices_are_larger(groups):
    return min(m * n for m, n in groups[0]) - 1


@pytest.mark.parametrize(("size", "rank", "gigabytes"), [("60m", 128, 0.264), ("130m", 256, 0.589), ("1b", 512, 4.018)])
def test_sltrain_is_counted_with_its_indices(size, rank, gigabytes):
    """Published bytes: 6 for each parameter, 4 for each index (arXiv 2406.02214, appendix F, with 32 bits)."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig.from_json_file(MODELS / f"{size}.json"))
    parametrize(model, SLTrainConfig(rank=rank))
    values = sum(r.numel for r in records(model) if r.name.endswith(".values"))
    keys = 16 * sum(r.name.endswith(".values") for r in records(model))
    assert buffer_bytes(model) == 4 * values + keys
    assert paper_bytes(model) / 1e9 == pytest.approx(gigabytes, abs=6e-4)


def test_paper_bytes_of_a_treated_matrix():
    """2 x 20 weights, 4 x 8 of Adam on the vector, 2 x 5 floats of state of the matrix."""
    listed = [ParameterRecord("attn", (3, 4), "dense"), ParameterRecord("norm", (8,))]
    assert paper_bytes(listed, treated_state=lambda r: 5 if r.name == "attn" else None) == 2 * 20 + 4 * 8 + 2 * 5
    assert paper_bytes(listed, treated_state=lambda r: 0 if r.name == "attn" else None) == 2 * 20 + 4 * 8


def test_records_skip_frozen_parameters_and_know_what_zero_3_has_cut():
    model = nn.ModuleDict({"attn": nn.Linear(6, 8, bias=False), "frozen": nn.Linear(2, 2), "cut": nn.Linear(3, 5)})
    parametrize(model, LowRankConfig(rank=2, target_modules=("attn",)))
    model["frozen"].requires_grad_(False)
    model["cut"].weight.ds_id, model["cut"].weight.ds_shape = 7, torch.Size([5, 3])
    model["cut"].weight.data = torch.empty(0)
    assert records(model) == [
        ParameterRecord("attn.B", (8, 2), "factor"),
        ParameterRecord("attn.A", (2, 6), "factor"),
        ParameterRecord("cut.weight", (5, 3), "dense"),
        ParameterRecord("cut.bias", (5,), "dense"),
    ]


def test_measuring_counts_a_shared_storage_once_and_no_scalar():
    flat = torch.zeros(10)
    module = nn.Linear(3, 3)
    module.weight.data, module.bias.data = flat[:9].view(3, 3), flat[9:].expand(3)
    module.weight.grad = torch.zeros(3, 3)
    master = torch.zeros(5)
    state = {
        master: {
            "step": torch.tensor(1.0),
            "exp_avg": torch.zeros(5),
            "exp_avg_sq": torch.zeros(5),
            "note": "-",
        }
    }
    optimizer = SimpleNamespace(
        single_partition_of_fp32_groups=[master, flat[2:]], averaged_gradients={0: [torch.zeros(2)], 1: None}
    )
    engine = SimpleNamespace(module=module, optimizer=optimizer, basic_optimizer=SimpleNamespace(state=state))
    assert measured_bytes(engine) == in_elements(10, 9 + 2, 5, 10)


def test_peak_memory_is_in_bytes():
    block = np.ones(2**23)  # 64 MiB
    assert peak_memory_bytes() > block.nbytes


def test_import_is_cheap():
    heavy = ["deepspeed", "transformers", "datasets", "matplotlib"]
    code = f"import sys, megalr.memory.formulas; print([name for name in {heavy} if name in sys.modules])"
    assert run(python(code)).stdout == "[]\n"
