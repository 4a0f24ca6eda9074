"""A LLaMA of odd sizes."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 61
MODEL = {
    "hidden_size": 20,
    "intermediate_size": 33,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
}


def small_llama(*, tied: bool = False) -> LlamaForCausalLM:
    """The same dense model each time; tied: its head is its embedding."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**MODEL, tie_word_embeddings=tied))
