"""Tensor parallelism times ZeRO against one process, tensor by tensor; and what low-rank layers send."""

from __future__ import annotations

import functools

import pytest
import torch

import megalr
from megalr.config import MegalrConfig
from megalr.layers import densify
from tests.distributed import rule_training, tensor_training
from tests.distributed.test_rules import assert_same_weights, largest_error
from tests.distributed.training import CLIPPING
from tests.plain_projected import plain_projected
from tests.plain_training import plain_training
from tests.reference import Recipe, Reference

pytestmark = pytest.mark.distributed
MODULE = "tests.distributed.tensor_training"
STAGES = (0, 1, 2, 3)
LAYOUTS = ((2, 1), (2, 2), (4, 1), (1, 4))  # tensor-parallel x data-parallel ranks
# Eight bits of a moment or a basis turn over where a sum in another order lies on the other side of a half.
TOLERANCE = {"QGaLoreAdamW": 1e-2}
RULES = list(rule_training.RULES)
MATRICES = {"AdamW": 0, "SCALE": 16}  # the others have the 14 of two layers


@functools.cache
def plain_weights(optimizer: str) -> dict[str, torch.Tensor]:
    """What tests/references make of the same model, data and settings."""
    model, data = tensor_training.dense_model(tensor_training.SPREAD), rule_training.batches(rule_training.STEPS)
    return plain_training(model, data, optimizer, tensor_training.settings(optimizer), clip=CLIPPING)


def covering(names):
    """Each name once at one stage and layout for every day, all stages and layouts among them; the rest is slow."""
    rows = []
    for i, name in enumerate(names):
        for j, layout in enumerate(LAYOUTS):
            for stage in STAGES:
                daily = j == i % len(LAYOUTS) and stage == (i + i // len(LAYOUTS)) % len(STAGES)
                rows.append(pytest.param(name, layout, stage, marks=[] if daily else [pytest.mark.slow]))
    return rows


@pytest.mark.parametrize(("optimizer", "layout", "stage"), covering(RULES))
def test_rules_equal_one_process(ranks, optimizer, layout, stage):
    tensor, data = layout
    results = ranks(tensor * data).run(f"{MODULE}:train", tensor, stage, optimizer)
    assert_same_weights(results[0][0], plain_weights(optimizer), TOLERANCE.get(optimizer, 1e-4))
    if optimizer != "BAdam":  # which lets most matrices rest
        made = MATRICES.get(optimizer, 14) * rule_training.STEPS
        assert sum(counts["calls"] for _, counts in results) == made * (data if stage == 0 else 1)


@functools.cache
def plain_factors() -> dict[str, torch.Tensor]:
    """What tests/reference.py makes of the same low-rank model, data and recipe."""
    section, params = tensor_training.LOW_RANK, rule_training.RULES["AdamW"]
    model = megalr.parametrize(tensor_training.dense_model(), {"megalr": section})
    recipe = Recipe(
        lr=lambda step: params["lr"],
        embedding_lr=lambda step: params["embedding"]["lr"],
        weight_decay=params["weight_decay"],
        clip=CLIPPING,
        refactorize_every=section["refactorization"]["interval"],
        refactorization_resets=True,
        reset_every=section["momentum_reset"]["interval"],
        reset_all=False,
        ramp_steps=section["momentum_reset"]["warmup_steps"],
    )
    reference = Reference(model, recipe)
    for ids in rule_training.batches(tensor_training.FACTOR_STEPS):
        reference.step([ids])
    weights = {name: p.detach() for name, p in model.named_parameters()}
    return densify(weights, MegalrConfig.from_json({"megalr": section}).parametrization)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_low_rank_factors_equal_one_process(ranks, layout, stage):
    """With two refactorizations and two momentum resets."""
    tensor, data = layout
    got = ranks(tensor * data).run(f"{MODULE}:train_factors", tensor, stage)[0]
    assert_same_weights(got, plain_factors())


@pytest.mark.parametrize(("kind", "layout", "stage"), covering([*tensor_training.PROJECTED]))
def test_projected_layers_equal_one_process(ranks, kind, layout, stage):
    """With two refreshes of every basis."""
    tensor, data = layout
    got = ranks(tensor * data).run(f"{MODULE}:train_projected", tensor, stage, kind)[0]
    # One subspace step is not in the plain reference; its own single process is.
    one = kind == "power"
    assert_same_weights(
        got, ranks(1).run(f"{MODULE}:train_projected", 1, 0, kind)[0] if one else projected_weights(kind)
    )


@functools.cache
def projected_weights(kind: str) -> dict[str, torch.Tensor]:
    """What tests/plain_projected.py makes of the same model, data and settings."""
    model, data = tensor_training.dense_model(tensor_training.SPREAD), rule_training.batches(rule_training.STEPS)
    section = tensor_training.projected(kind)
    return plain_projected(model, data, section, rule_training.RULES["AdamW"], clip=CLIPPING)


@pytest.mark.parametrize(("layout", "stage"), [((2, 1), 1), ((2, 2), 0), ((2, 2), 3), ((4, 1), 2)])
def test_sltrain_equals_one_process(ranks, layout, stage):
    """With two refactorizations and two momentum resets."""
    tensor, data = layout
    got = ranks(tensor * data).run(f"{MODULE}:train_sltrain", tensor, stage)[0]
    assert_same_weights(got, ranks(1).run(f"{MODULE}:train_sltrain", 1, 0)[0])


@pytest.mark.parametrize("stage", [0, 3])
def test_groups_of_the_users_own(ranks, stage):
    """An ``mpu`` object, as Megatron-LM has one."""
    assert_same_weights(ranks(4).run(f"{MODULE}:train_with_units", stage)[0], plain_factors())


@pytest.mark.parametrize("kind", ["full", "low_rank"])
@pytest.mark.parametrize("stage", [0, 3])
def test_grouped_query_attention(ranks, kind, stage):
    """Two key-value heads for four queries: one for each rank."""
    one, two = (ranks(t).run(f"{MODULE}:train_grouped", t, stage, kind)[0] for t in (1, 2))
    assert_same_weights(two, one)


@pytest.mark.parametrize("kind", tensor_training.SECTIONS)
@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("stage", [0, 2])
def test_logits_loss_and_gradients_equal_one_process(ranks, kind, tensor, stage):
    expected = first_step(kind)
    got = ranks(tensor).run(f"{MODULE}:first_step", tensor, stage, kind)[0]
    assert got.keys() == expected.keys()
    assert_same_weights(got, expected, 1e-5)


@functools.cache
def first_step(kind: str) -> dict[str, torch.Tensor]:
    model = tensor_training.dense_model()
    megalr.parametrize(model, {"megalr": tensor_training.SECTIONS[kind]})
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


@pytest.mark.parametrize("optimizer", ["GaLoreAdamW", "Muon"])
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("only_rank", [None, 1])
def test_a_gradient_that_is_not_finite_changes_nothing(ranks, optimizer, stage, only_rank):
    where = "model.layers.1.mlp.down_proj.weight"
    for changed, unmoved, _ in ranks(2).run(f"{MODULE}:poison", stage, optimizer, where, only_rank):
        assert changed == [] and unmoved == []


@pytest.mark.parametrize(("layout", "stage"), [((2, 1), 2), ((2, 2), 0), ((2, 2), 1), ((2, 2), 3)])
@pytest.mark.parametrize("optimizer", [None, "GaLoreAdamW"])
def test_resume_is_bitwise(ranks, layout, stage, optimizer, tmp_path):
    tensor, data = layout
    different = ranks(tensor * data).run(f"{MODULE}:resume", tensor, stage, str(tmp_path / "a b"), optimizer)
    assert different == [[]] * (tensor * data)


def test_a_local_update_is_another_method_and_sends_nothing(ranks):
    results = ranks(2).run(f"{MODULE}:train", 2, 1, "GaLoreAdamW", megalr={"tp_update": "local"})
    counts = results[0][1]
    assert counts["bytes"] == ranks(2).run(f"{MODULE}:train", 2, 1, "AdamW")[0][1]["bytes"]  # of the last gathering
    assert largest_error(results[0][0], plain_weights("GaLoreAdamW"))[0] > 1e-2


@pytest.mark.parametrize(
    ("tensor", "model", "section", "words"),
    [
        (2, {"num_attention_heads": 3, "num_key_value_heads": 3}, {}, "num_attention_heads = 3, which so many ranks"),
        (2, {"num_key_value_heads": 1}, {}, "num_key_value_heads = 1, which so many ranks"),
        (2, {}, {"parametrization": {"type": "cola", "rank": 4}}, "q_proj is a ColaLinear, which cannot be cut"),
        (2, {}, {"parametrization": {"type": "lora", "rank": 4}}, "q_proj is a LoraLinear, which cannot be cut"),
        (2, {}, {"activations": {"groups": 6, "target_modules": ["attn"]}}, "remove megalr.activations"),
    ],
)
def test_what_cannot_be_shared_is_refused(ranks, tensor, model, section, words):
    for message in ranks(2).run(f"{MODULE}:refused", tensor, model, **section):
        assert words in message
