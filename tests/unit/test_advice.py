"""Warnings at build time: a head that nobody named, rates that a schedule writes over, factors above their weight."""

import logging

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

import megalr
from megalr.hosts.deepspeed_config import COMMON_RATES, common_rate
from megalr.optim import advice


@pytest.fixture
def said(caplog):
    """Builds an optimizer, and returns the warnings about it."""
    advice._warn.cache_clear()

    def _said(model, config, build=megalr.build_optimizer):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "megalr.optim.advice"):
            build(megalr.parametrize(model, config), config)
        return [record.getMessage() for record in caplog.records if record.name == "megalr.optim.advice"]

    yield _said
    advice._warn.cache_clear()


def model(head="head", width=8, **more):
    block = {"attn": nn.Linear(width, width), "up": nn.Linear(width, 4 * width)}
    layers = {"embed": nn.Embedding(9, width), "blocks": nn.ModuleList([nn.ModuleDict(block)])}
    return nn.ModuleDict({**layers, head: nn.Linear(width, 9, bias=False), **more})


def adamw(**params):
    return {"optimizer": {"type": "AdamW", "params": params}}


def muon(**params):
    return {"optimizer": {"type": "Muon", "params": params}}


def low_rank(rank=2, kind="low_rank", targets=("attn",), **more):
    section = {"type": kind, "rank": rank, "target_modules": list(targets), **more}
    return {"optimizer": {"type": "AdamW"}, "megalr": {"parametrization": section}}


def test_a_head_that_the_rule_gets_is_named_once(said):
    (message,) = said(model(), muon())
    assert "head has as many outputs as embed has rows" in message and "muon updates head" in message
    assert 'write "target_modules": ["blocks."] in optimizer.params to leave it out' in message
    assert said(model(), muon()) == []
    groups = {group.name: list(group.parameters) for group in megalr.build_optimizer(model(), muon()).groups}
    assert "head.weight" in groups["matrices"]  # told, not changed
    spared = megalr.build_optimizer(model(), muon(target_modules=["blocks."])).groups
    assert [list(g.parameters) for g in spared if g.rule] == [["blocks.0.attn.weight", "blocks.0.up.weight"]]


def tied():
    net = model()
    net["head"].weight = net["embed"].weight
    return net


class Telling(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = model()

    def get_output_embeddings(self):
        return self.layers["head"]


@pytest.mark.parametrize(
    ("net", "config"),
    [
        (model("lm_head"), muon()),
        (Telling(), muon()),
        (tied(), muon()),
        (model(), muon(target_modules=["blocks."])),
        (model(), muon(target_modules=["attn", "head"])),
        (model(), adamw()),
        (nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 9)), muon()),
        (model("lm_head"), low_rank(targets=["attn", "lm_head"])),
        (model(), low_rank(targets=["attn", "head"])),
    ],
)
def test_no_word_where_the_head_is_known_or_chosen(said, net, config):
    assert said(net, config) == []


@pytest.mark.parametrize("kind", ["low_rank", "lora", "projected"])
def test_a_head_that_is_replaced_is_named(said, kind):
    (message,) = said(model(), low_rank(kind=kind, targets=["attn", "hea"]))
    assert f"head is replaced by a {kind} layer" in message
    assert 'write "target_modules": ["blocks."] in megalr.parametrization to leave it out' in message


def test_settings_for_a_head_that_is_not_found_are_named(said):
    (message,) = said(model(), adamw(embedding={"lr": 1e-2}))
    assert "does not apply to head. If it is the head, name it in one of these two ways" in message


RATES = {"lr": 1e-2, "embedding": {"lr": 2e-2}}


@pytest.mark.parametrize(
    ("kind", "params", "words"),
    [
        ("WarmupLR", {"warmup_max_lr": 3e-3}, 'scheduler.params.warmup_max_lr, which is 0.003. So "lr": 0.01 and'),
        ("WarmupDecayLR", {"total_num_steps": 9}, "warmup_max_lr, which is 0.001 by default. So"),
        ("OneCycle", {"cycle_min_lr": 0, "cycle_max_lr": 2e-2}, 'cycle_max_lr, which is 0.02. So "lr": 0.01 in opt'),
        ("LRRangeTest", {}, "lr_range_test_min_lr, which is 0.001 by default"),
        ("OneCycleLR", {"max_lr": 3e-3, "total_steps": 9}, "max_lr, which is 0.003"),
        ("WarmupLR", {}, None),
        ("WarmupCosineLR", {"total_num_steps": 9}, None),
        ("StepLR", {"step_size": 9}, None),
    ],
)
def test_rates_that_a_schedule_writes_over_are_named(said, kind, params, words):
    config = {**adamw(**RATES), "scheduler": {"type": kind, "params": params}}
    messages = said(model("lm_head"), config)
    assert [words in message for message in messages] == [True] * (words is not None)
    assert all('"embedding": {"lr": 0.02}' in message for message in messages) == (kind != "OneCycle" or not messages)


def test_equal_or_absent_rates_are_not_named(said):
    scheduler = {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-2}}}
    assert said(model("lm_head"), {**adamw(lr=1e-2), **scheduler}) == []
    assert said(model("lm_head"), {**adamw(), **scheduler}) == []
    assert said(model("lm_head"), adamw(**RATES)) == []


@pytest.mark.parametrize("kind", COMMON_RATES)
def test_a_schedule_gives_all_groups_what_is_said(kind):
    """The table is DeepSpeed's and torch's behavior, whatever the groups' own rates are."""
    from deepspeed.runtime import lr_schedules

    made = {
        "WarmupLR": {"warmup_max_lr": 3e-3, "warmup_num_steps": 2},
        "WarmupDecayLR": {"warmup_max_lr": 3e-3, "warmup_num_steps": 2, "total_num_steps": 10**6},
        "OneCycle": {"cycle_min_lr": 0.0, "cycle_max_lr": 3e-3, "cycle_first_step_size": 3, "cycle_momentum": False},
        "LRRangeTest": {"lr_range_test_min_lr": 3e-3, "lr_range_test_step_rate": 0.0},
        "OneCycleLR": {"max_lr": 3e-3, "total_steps": 10},
        "CyclicLR": {"base_lr": 0.0, "max_lr": 3e-3, "step_size_up": 3, "cycle_momentum": False},
    }
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (1e-2, 2e-2)]
    optimizer = torch.optim.Adam(groups)
    schedule = getattr(lr_schedules, kind, getattr(torch.optim.lr_scheduler, kind, None))(optimizer, **made[kind])
    found = []
    for _ in range(6):
        optimizer.step()
        schedule.step()
        found.append([group["lr"] for group in optimizer.param_groups])
    key, value, is_default = common_rate({"scheduler": {"type": kind, "params": made[kind]}})
    assert key in made[kind] and not is_default
    assert all(first == second for first, second in found)
    assert max(first for first, _ in found) == pytest.approx(value, rel=1e-4)


@pytest.mark.parametrize(("kind", "more"), [("low_rank", {}), ("cola", {}), ("loro", {}), ("sltrain", {})])
def test_factors_larger_than_their_weight_are_named(said, kind, more):
    (message,) = said(model("lm_head"), low_rank(6, kind, ["attn"], **more))
    assert "the factors of 1 of 1 replaced layers have more elements than the dense weight" in message
    assert ("(blocks.0.attn: 96 elements in place of 64)" in message) == (kind != "sltrain")
    limit = 3 if kind == "sltrain" else 4
    assert f"At a rank of at most {limit} none has" in message
    assert said(model("lm_head"), low_rank(limit, kind, ["attn"], **more)) == []


@pytest.mark.parametrize("kind", ["lora", "relora", "switchlora", "mora", "projected"])
def test_factors_beside_a_weight_may_be_large(said, kind):
    assert said(model("lm_head"), low_rank(6, kind)) == []


def test_only_rank_0_warns(said, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert said(model(), muon()) == []


def test_an_lr_scheduler_of_ones_own_takes_the_place_of_the_jsons(said, monkeypatch):
    def start(model, optimizer, content, **kwargs):
        raise KeyError

    monkeypatch.setattr("megalr.api.start_engine", start)
    scheduler = {"type": "WarmupLR", "params": {"warmup_max_lr": 3e-3}}
    config = {**adamw(lr=1e-2), "scheduler": scheduler, "train_batch_size": 4}

    def build(**more):
        def _build(model, config):
            with pytest.raises(KeyError):
                megalr.initialize(model=model, config=config, **more)

        return _build

    assert said(model("lm_head"), config, build(lr_scheduler=lambda optimizer: None)) == []
    assert len(said(model("lm_head"), config, build())) == 1


def test_two_classes_and_two_token_types_are_no_head(said):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    net = BertForSequenceClassification(BertConfig(vocab_size=11, num_labels=2, **sizes))
    assert said(net, muon()) == []
