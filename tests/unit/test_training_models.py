"""Model shapes, and whether they fit the text."""

import json
from pathlib import Path

import pytest
import torch
from transformers import T5TokenizerFast

from megalr.config.settings import MegalrConfig
from megalr.data import load_tokenizer
from megalr.data.sources import LocalText
from megalr.data.tokens import TokenCache
from megalr.errors import UserError
from megalr.hosts.deepspeed_config import check_deepspeed_config
from megalr.train.ds_config import Request, resolve
from megalr.train.models import build_model, config_from_dict, fit_to_text, read_model_config

ROOT = Path(__file__).parents[2]
MODELS = ROOT / "launchers" / "models"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(None)


def test_a_name_or_a_path(tmp_path):
    assert read_model_config("tiny", MODELS).hidden_size == 128
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"model_type": "llama", "hidden_size": 64}))
    assert read_model_config(str(path), MODELS).hidden_size == 64


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no model called .*one of .*tiny"),
        ("{", "not valid JSON"),
        ('{"model_type": "gpt2"}', "no LLaMA"),
        ("[]", "must hold a JSON object"),
        ("[" * 100_000, "brackets lie too deep"),
        ('{"hidden_size": 64, "hidden_size": 32}', '"hidden_size" twice'),
        ('{"hiden_size": 64}', 'a key "hiden_size"; did you mean "hidden_size"'),
        ('{"num_hidden_layers": 0}', "num_hidden_layers is 0; write a whole number of at least 1"),
        ('{"vocab_size": "64"}', 'vocab_size is "64"; write a whole number'),
        ('{"num_key_value_heads": 2.0}', "num_key_value_heads is 2.0; write a whole number"),
        ('{"hidden_size": 30, "num_attention_heads": 4}', "no valid LLaMA configuration"),
    ],
)
def test_other_models_are_refused(tmp_path, content, words):
    path = tmp_path / "mine.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=words):
        read_model_config(str(path), MODELS)


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(tokenizer):
    config = read_model_config("tiny", MODELS)
    config.vocab_size = 4095
    with pytest.raises(UserError, match="4,095 entries, the tokenizer's 4,096"):
        fit_to_text(config, tokenizer, 256)


def test_a_larger_vocabulary_is_fine(tokenizer):
    config = read_model_config("60m", MODELS)
    fit_to_text(config, tokenizer, 256)
    assert config.eos_token_id == tokenizer.eos_token_id


def t5_tokenizer(sentinels_are_words: bool):
    """Of the form that t5-base has: 32,000 pieces, and 100 sentinels after them."""
    letters = [(letter, -9.0) for letter in "abcdefghijklmnopqrstuvwxyz<>_0123456789▁"]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *letters]
    pieces += [(f"▁w{i}", -10.0) for i in range(32_000 - len(pieces))]
    if sentinels_are_words:
        pieces += [(f"<extra_id_{i}>", 0.0) for i in reversed(range(100))]
    return T5TokenizerFast(vocab=pieces, extra_ids=100)


@pytest.mark.parametrize("sentinels_are_words", [False, True])
def test_the_papers_models_fit_the_papers_tokenizer(sentinels_are_words, tmp_path):
    tokenizer = t5_tokenizer(sentinels_are_words)
    assert len(tokenizer) == 32_100
    config = read_model_config("60m", MODELS)
    fit_to_text(config, tokenizer, 256)
    assert config.vocab_size == 32_000
    # And no text, not even one with a sentinel's name in it, becomes a token that the model lacks.
    file = tmp_path / "text.txt"
    file.write_text("w5 <extra_id_7><extra_id_0> w17")
    cache = TokenCache(LocalText((file,), "text"), tokenizer, tmp_path, None)
    cache.write()
    tokens = cache.load().tokens
    assert tokens.max() < 32_000
    assert (tokenizer.unk_token_id in tokens) == sentinels_are_words
    config.vocab_size = 31_999
    with pytest.raises(UserError, match="31,999 entries, the tokenizer's 32,000"):
        fit_to_text(config, tokenizer, 256)


def test_a_sequence_longer_than_the_model_is_refused(tokenizer):
    with pytest.raises(UserError, match="--sequence-length is 1025.*at most 1024"):
        fit_to_text(read_model_config("tiny", MODELS), tokenizer, 1025)


def test_weights_follow_from_the_seed_alone():
    first = build_model(read_model_config("tiny", MODELS), seed=3)
    torch.rand(5)
    again = build_model(config_from_dict(read_model_config("tiny", MODELS).to_dict()), seed=3)
    other = build_model(read_model_config("tiny", MODELS), seed=4)
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name])
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_shipped_configurations_are_valid(stage):
    content = json.loads((ROOT / "ds_configs" / f"zero{stage}_lowrank.json").read_text())
    request = Request(
        world_size=2,
        bf16_is_fast=False,
        default_batch_size=12,
        default_steps=450,
        largest_micro_batch=16,
        default_rank=32,
    )

    config = resolve(content, request).config

    check_deepspeed_config({**config, "train_batch_size": 6}, 1)
    parsed = MegalrConfig.from_json(config)
    assert config["zero_optimization"]["stage"] == stage
    assert parsed.parametrization.rank == 32
    assert parsed.optimizer.embedding.lr != parsed.optimizer.lr
    assert parsed.refactorization is not None
    assert parsed.momentum_reset is not None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"zero_optimization": {"stagee": 1}}, 'zero_optimization has no key "stagee"; did you mean "stage"'),
        ({"hybrid_engine": {"enable": 1}}, '"enable": Extra inputs'),
        ({"zero_optimization": {"stage": 4}}, "DeepSpeed refuses"),
        ({"scheduler": {"type": "Warmup"}}, "scheduler.type is 'Warmup'.*WarmupCosineLR"),
        ({"scheduler": {"type": "WarmupLR", "params": {"steps": 3}}}, 'no "steps" for WarmupLR'),
        ({"train_batch_size": 5, "gradient_accumulation_steps": 2}, "train_batch_size is 5, which is not .*: write 4"),
    ],
)
def test_what_deepspeed_refuses_is_said_shortly(change, words):
    config = {"train_micro_batch_size_per_gpu": 2, **change}
    with pytest.raises(UserError, match=words) as error:
        check_deepspeed_config(config, 1)
    assert len(str(error.value)) < 400
