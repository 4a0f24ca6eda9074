"""Tensor parallelism times ZeRO against one process, tensor by tensor; and what low-rank layers send."""

from __future__ import annotations

import functools
import itertools
import re
from typing import Any

import pytest
import torch

import megalr
from tests.covering import daily_and_slow, in_turn
from tests.deepspeed import rule_training, tensor_training
from tests.deepspeed.harness import RankPool
from tests.deepspeed.test_rules import assert_same_weights, largest_error
from tests.deepspeed.training import CLIPPING
from tests.plain_factors import plain_factors
from tests.plain_projected import plain_projected
from tests.plain_training import plain_training
from tests.references import REFERENCES

pytestmark = pytest.mark.distributed
MODULE = "tests.deepspeed.tensor_training"
STAGES = (0, 1, 2, 3)
LAYOUTS = ((2, 1), (2, 2), (4, 1), (1, 4))  # tensor-parallel x data-parallel ranks
MATRICES = 14  # of two layers
RULES = list(rule_training.RULES)
PROJECTED = {f"projected layers, {name}": name for name in tensor_training.PROJECTED}
LAYERS = {"low-rank layers": tensor_training.LOW_RANK, "SLTrain": tensor_training.SLTRAIN}
KINDS = [*RULES, *LAYERS, *PROJECTED]


# Every layout that cuts layers at every stage, and each of these kinds once. How a rule gets its matrices together is
# the same for all of them: tests/world holds every rule at every way of cutting.
DAILY = [
    ("low-rank layers", (2, 1), 0),
    ("projected layers, output", (2, 1), 1),
    ("Muon", (2, 1), 2),
    ("SLTrain", (2, 1), 3),
    ("projected layers, input", (2, 2), 0),  # replicas that have other data
    ("QGaLoreAdamW", (2, 2), 1),
    ("projected layers, std", (2, 2), 2),
    ("GaLoreAdamW", (2, 2), 3),
    ("BAdam", (4, 1), 0),
    ("projected layers, power", (4, 1), 1),
    ("SCALE", (4, 1), 2),
    ("projected layers, random", (4, 1), 3),
    ("AdamW", (1, 4), 3),
]
COMBINATIONS = [
    *DAILY,
    *(
        pytest.param(*row, marks=pytest.mark.slow)
        for row in itertools.product(KINDS, LAYOUTS, STAGES)
        if row not in DAILY
    ),
]


@pytest.mark.parametrize(("kind", "layout", "stage"), COMBINATIONS)
def test_equals_one_process(ranks, kind, layout, stage):
    """Two refreshes of every basis are in it, or two refactorizations and two momentum resets."""
    tensor, data = layout
    got, calls = trained(ranks(tensor * data), kind, tensor, stage)
    assert_same_weights(got, expected(kind), REFERENCES[kind].tensor_parallel_bound if kind in RULES else 1e-4)
    if kind in RULES and not REFERENCES[kind].rests:
        params = rule_training.RULES[kind]
        copies = tensor if stage == 0 or data == 1 else 1  # of the embeddings, which AutoTP does not cut
        matrices = 0 if kind == "AdamW" else MATRICES + params.get("head", 0) + copies * params.get("embeddings", 0)
        assert calls == matrices * rule_training.STEPS * (data if stage == 0 else 1)


def trained(pool: RankPool, kind: str, tensor: int, stage: int) -> tuple[dict[str, torch.Tensor], int]:
    """The masters after training with so many tensor-parallel ranks, and the rule's calls on all ranks."""
    if kind in PROJECTED:
        return pool.run(f"{MODULE}:train_projected", tensor, stage, PROJECTED[kind])[0], 0
    if kind in LAYERS:
        return pool.run(f"{MODULE}:train_factors", tensor, stage, LAYERS[kind])[0], 0
    results = pool.run(f"{MODULE}:train", tensor, stage, kind)
    return results[0][0], sum(counts["calls"] for _, counts in results)


@functools.cache
def expected(kind: str) -> dict[str, torch.Tensor]:
    """What plain references make of the same model, data and settings in one process without DeepSpeed."""
    params, data = rule_training.RULES["AdamW"], rule_training.batches(rule_training.STEPS)
    model = tensor_training.dense_model(tensor_training.SPREAD)
    if kind in RULES:
        return plain_training(model, data, kind, tensor_training.settings(kind), clip=CLIPPING)
    if kind in PROJECTED:
        section = tensor_training.projected(PROJECTED[kind])
        if section.get("projector") != "power":
            return plain_projected(model, data, section, params, clip=CLIPPING)
        with RankPool(1) as pool:  # a subspace step, which the plain reference has not
            return trained(pool, kind, 1, 0)[0]
    model, data = tensor_training.dense_model(), rule_training.batches(tensor_training.FACTOR_STEPS)
    section = {**LAYERS[kind]["parametrization"], "target_modules": ["attn", "mlp"]}
    section["restarts"] = {
        "refactorize_every": LAYERS[kind]["refactorization"]["interval"],
        "reset_every": LAYERS[kind]["momentum_reset"]["interval"],
        "warmup": LAYERS[kind]["momentum_reset"]["warmup_steps"],
    }
    return plain_factors(model, data, section, params, clip=CLIPPING)


@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.slow), 3])
def test_groups_of_the_users_own(ranks, stage):
    """An ``mpu`` object, as Megatron-LM has one."""
    assert_same_weights(ranks(4).run(f"{MODULE}:train_with_units", stage)[0], expected("low-rank layers"))


VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "two key-value heads for four queries, one a rank": ({"num_key_value_heads": 2}, {}),
    "head cut by vocabulary": ({}, {"vocab_parallel_lm_head": True}),
    "tied head cut by vocabulary": ({"tie_word_embeddings": True}, {"vocab_parallel_lm_head": True}),
    "tied head": ({"tie_word_embeddings": True}, {}),
}


@pytest.mark.parametrize(
    ("variant", "what"), in_turn([(variant,) for variant in VARIANTS], [("low_rank", 3), ("full", 0)])
)
def test_variants_of_models_and_cuts(ranks, variant, what):
    kind, stage = what
    one, two = (ranks(t).run(f"{MODULE}:train_variant", t, stage, kind, *VARIANTS[variant])[0] for t in (1, 2))
    assert_same_weights(two, one)


FROZEN = {"frozen": ("embed_tokens", "0.self_attn.q_proj")}


@pytest.mark.parametrize(
    ("kind", "stage", "changes"),
    [
        ("low_rank", 2, {"accumulation": 4}),
        ("projected, input", 1, {"accumulation": 4}),
        ("full", 1, FROZEN),
        ("low_rank", 2, {"frozen": ("embed_tokens", "0.input_layernorm")}),
    ],
)
def test_accumulation_and_frozen_parameters(ranks, kind, stage, changes):
    one = ranks(1).run(f"{MODULE}:train_variant", 1, stage, kind, frozen=changes.get("frozen", ()))[0]
    assert_same_weights(ranks(2).run(f"{MODULE}:train_variant", 2, stage, kind, **changes)[0], one)


@pytest.mark.parametrize(
    ("kind", "stage"), [pytest.param("low_rank", 1, marks=pytest.mark.slow), ("projected, input", 2), ("low_rank", 3)]
)
def test_bf16_stays_close(ranks, kind, stage):
    one = ranks(1).run(f"{MODULE}:train_variant", 1, stage, kind)[0]
    assert_same_weights(ranks(2).run(f"{MODULE}:train_variant", 2, stage, kind, bf16={"enabled": True})[0], one, 5e-2)


@pytest.mark.parametrize(
    ("stage", "bf16", "kind"),
    in_turn([(0, False), (1, False), (2, False), (3, False), (0, True), (1, True)], ["full", "low_rank"]),
)
def test_the_norm_for_clipping_is_that_of_one_process(ranks, kind, stage, bf16):
    """DeepSpeed computes it, from the marks of what is cut; AdamW's weights hardly depend on it."""
    changes = {"bf16": {"enabled": bf16}, "model": {"initializer_range": tensor_training.SPREAD}}
    one, two = (ranks(t).run(f"{MODULE}:norms", t, stage, kind, **changes)[0] for t in (1, 2))
    assert len(one) == 3 and min(one) > CLIPPING
    if bf16:  # weights part a little after the first update
        assert two[0] == pytest.approx(one[0], rel=5e-3)
    else:
        assert two == pytest.approx(one, rel=1e-4)


@pytest.mark.parametrize(
    ("kind", "stage"),
    [("low_rank", 0), ("low_rank", 2), ("sltrain", 1), ("projected, input", 1), ("projected, output", 0)],
)
def test_copies_stay_the_same_bit_for_bit(ranks, kind, stage):
    assert ranks(2).run(f"{MODULE}:copies_apart", 2, stage, kind) == [[], []]


@pytest.mark.parametrize("kind", ["low_rank", "sltrain", "projected, input", "projected, output"])
def test_siblings_that_get_different_inputs(ranks, kind):
    """A third layer that is asked for what it would get with the first one's input gets its own."""
    for errors in ranks(2).run(f"{MODULE}:siblings", kind):
        assert max(errors) < 1e-5


BIASES = {"attention_bias": True, "mlp_bias": True}


@pytest.mark.parametrize(
    ("kind", "stage"),
    [("low_rank", 1), ("low_rank", 3), ("sltrain", 1), ("projected, input", 1), ("projected, output", 1)],
)
def test_biases_and_a_factorized_head(ranks, kind, stage):
    one, two = (ranks(t).run(f"{MODULE}:first_step", t, stage, f"{kind}, head", model=BIASES)[0] for t in (1, 2))
    assert any(name.endswith("down_proj.bias") for name in one)
    assert two.keys() == one.keys()
    assert_same_weights(two, one)


@pytest.mark.parametrize("kind", ["full", "low_rank", "sltrain", "projected, input", "projected, output"])
@pytest.mark.parametrize(("tensor", "stage"), [(1, 0), (2, 0), (2, 2), (4, 2)])
def test_logits_loss_and_gradients_equal_one_process(ranks, kind, tensor, stage):
    one = first_step(kind)
    got = ranks(tensor).run(f"{MODULE}:first_step", tensor, stage, kind)[0]
    assert got.keys() == one.keys()
    assert_same_weights(got, one, 1e-5)


@functools.cache
def first_step(kind: str) -> dict[str, torch.Tensor]:
    model = tensor_training.dense_model(tensor_training.SPREAD if kind == "full" or "projected" in kind else 0.02)
    megalr.parametrize(model, {"megalr": tensor_training.SECTIONS[kind]}, other_optimizer=True)
    ids = rule_training.batches(1)[0]
    output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {"logits": output.logits.detach(), "loss": output.loss.detach()[None], **grads}


def test_low_rank_layers_send_what_is_as_wide_as_the_rank(ranks):
    rank, layers = tensor_training.LOW_RANK["parametrization"]["rank"], 2
    tokens = rule_training.SEQUENCES * rule_training.LENGTH
    sent = ranks(2).run(f"{MODULE}:messages", 2)[0]
    # Forward: o and down. Backward: down and o nothing, gate and up in one message, q, k and v in one.
    forward, backward = [(rank, rank * tokens)] * 2, [(2 * rank, 2 * rank * tokens), (3 * rank, 3 * rank * tokens)]
    assert sent == forward * layers + backward * layers
    # At stage 3 a layer's factors are there only while it is called: as many bytes, in more messages.
    each = ranks(2).run(f"{MODULE}:messages", 3)[0]
    assert sum(size for _, size in each) == sum(size for _, size in sent)
    assert {width for width, _ in each} == {rank}


@pytest.mark.parametrize(
    ("optimizer", "stage", "only_rank"), daily_and_slow(["GaLoreAdamW", "Muon"], [1, 2, 3], [None, 1])
)
def test_a_gradient_that_is_not_finite_changes_nothing(ranks, optimizer, stage, only_rank):
    where = "model.layers.1.mlp.down_proj.weight"
    for changed, unmoved, _ in ranks(2).run(f"{MODULE}:poison", stage, optimizer, where, only_rank):
        assert changed == [] and unmoved == []


@pytest.mark.parametrize(
    ("layout", "stage", "optimizer"),
    [
        ((2, 1), 2, "GaLoreAdamW"),
        ((2, 1), 0, None),
        ((2, 2), 1, "GaLoreAdamW"),
        ((2, 2), 3, None),
        *(
            pytest.param((2, 2), *how, marks=pytest.mark.slow)
            for how in [(0, None), (0, "GaLoreAdamW"), (1, None), (3, "GaLoreAdamW"), (2, None)]
        ),
    ],
)
def test_resume_is_bitwise(ranks, layout, stage, optimizer, tmp_path):
    tensor, data = layout
    different = ranks(tensor * data).run(f"{MODULE}:resume", tensor, stage, str(tmp_path / "a b"), optimizer)
    assert different == [[]] * (tensor * data)


@pytest.mark.parametrize("stage", [0, pytest.param(1, marks=pytest.mark.slow), 3])
def test_projected_layers_resume_before_their_first_pass(ranks, stage, tmp_path):
    """DeepSpeed looks at every layer's weight when it cuts the model."""
    assert ranks(2).run(f"{MODULE}:resume_at_once", stage, "input", str(tmp_path / "a")) == [[], []]


def test_a_local_update_is_another_method_and_sends_nothing(ranks):
    results = ranks(2).run(f"{MODULE}:train", 2, 1, "GaLoreAdamW", megalr={"tp_update": "local"})
    counts = results[0][1]
    assert counts["bytes"] == ranks(2).run(f"{MODULE}:train", 2, 1, "AdamW")[0][1]["bytes"]  # of the last gathering
    assert largest_error(results[0][0], expected("GaLoreAdamW"))[0] > 1e-2


def layers(*names: str, kind: str = "low_rank") -> dict[str, Any]:
    """The JSON's "parametrization" section."""
    return {"parametrization": {"type": kind, "rank": 4, "target_modules": list(names or ("attn", "mlp"))}}


def spec(pattern: str, kind: str, **more: Any) -> dict[str, Any]:
    """The JSON's "tensor_parallel" section with the cut of some layers, and that of down_proj."""
    specs = [{"patterns": [rf".*{pattern}\.weight$"], "partition_type": kind, **more}]
    specs.append({"patterns": [r".*down_proj\.weight$"], "partition_type": "row"})
    return {"section": {"partition_config": {"use_default_specs": False, "layer_specs": specs}}}


GATE_UP = spec("gate_up_proj", "column", shape=[2, -1], partition_dim=0)
HEADS, ONE_HEAD = {"num_attention_heads": 3, "num_key_value_heads": 3}, {"num_key_value_heads": 1}
CANNOT_BE_SHARED: dict[str, tuple[int, dict[str, Any], str]] = {
    "heads": (2, {"model": HEADS}, "num_attention_heads = 3, which so many ranks"),
    "key-value heads": (2, {"model": ONE_HEAD}, "num_key_value_heads = 1, which so many ranks"),
    "cola": (2, layers(kind="cola"), "q_proj is a ColaLinear, which cannot be cut"),
    "lora": (2, layers(kind="lora"), "q_proj is a LoraLinear, which cannot be cut"),
    "velora": (2, {"activations": {"groups": 6, "target_modules": ["attn"]}}, "remove megalr.activations"),
    "fused": (2, {"fused": True, **layers("mlp"), **GATE_UP}, 'gate_up_proj a "shape", as of fused'),
    "fused, sltrain": (2, {"fused": True, **layers("mlp", kind="sltrain"), **GATE_UP}, 'a "shape", as of fused'),
    "fused preset": (2, {"fused": True, "section": {"preset_model": "phi3"}, **layers()}, 'a "shape", as of fused'),
    "fused, own plan": (2, {"fused": True, **layers()}, "the model's own tensor-parallel plan: .* style"),
    "another dimension": (2, {**layers("mlp"), **spec("up_proj", "column", partition_dim=1)}, '"partition_dim": 1'),
    "factorized head": (
        2,
        {"section": {"vocab_parallel_lm_head": True}, **layers("mlp", "lm_head")},
        "leave lm_head out of megalr.parametrization.target_modules",
    ),
    "unknown key": (2, {"section": {"vocab_paralel_lm_head": True}}, '"vocab_paralel_lm_head": Extra inputs'),
    "second way": (2, {"second_way": True, **layers()}, "megalr.initialize cuts"),
    "second way, velora": (
        2,
        {"second_way": True, "activations": {"groups": 6, "target_modules": ["attn"]}},
        "remove megalr.activations",
    ),
    "both ways": (2, {"units": {}, **layers()}, "give one of the two"),
    "heads, mpu": (1, {"units": {}, "model": HEADS, **layers()}, "mpu='s tensor-parallel ranks is 2, but .* = 3"),
    "gate and up, mpu": (
        1,
        {"units": {}, **layers("gate_proj", "up_proj")},
        "up_proj is to be cut between .* has .*down_proj whole",
    ),
    "q, k and v, mpu": (
        1,
        {"units": {}, **layers("q_proj", "k_proj", "v_proj")},
        "v_proj is to be cut between .* has .*o_proj whole",
    ),
    "down, mpu": (1, {"units": {}, **layers("down_proj")}, "down_proj is to be cut between .* has .*gate_proj whole"),
}


@pytest.mark.parametrize("case", CANNOT_BE_SHARED)
def test_what_cannot_be_shared_is_refused(ranks, case):
    tensor, arguments, words = CANNOT_BE_SHARED[case]
    for message in ranks(2).run(f"{MODULE}:refused", tensor, **arguments):
        assert re.search(words, message), message


@pytest.mark.parametrize("parts", [{}, layers("self_attn")], ids=["no layer", "attention alone"])
def test_groups_of_the_users_own_may_leave_blocks_whole(ranks, parts):
    assert ranks(2).run(f"{MODULE}:refused", 1, units={}, **parts) == ["", ""]


def test_groups_that_leave_ranks_to_pipeline_stages_are_refused(ranks):
    for message in ranks(4).run(f"{MODULE}:refused", 1, units={"stages": 2}, **layers()):
        assert "together with pipeline stages" in message
