"""What the ranks run in the tests of tensor parallelism: a LLaMA cut by DeepSpeed's AutoTP, with ZeRO over the rest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import megalr
from tests.distributed import rule_training
from tests.distributed.rule_training import SEQUENCES
from tests.distributed.training import MEGALR, VOCABULARY, configuration, finish, run_steps

MODEL = {
    "hidden_size": 24,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
}

# Gradients of a fresh small model are so even that rounding decides on their singular vectors.
SPREAD = 0.2
LOW_RANK = {**MEGALR, "exchange_bucket_bytes": 20_000}
FACTOR_STEPS = 20


def dense_model(spread: float = 0.02) -> LlamaForCausalLM:
    """The same in every process; with so much standard deviation of its weights."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**MODEL, initializer_range=spread))


def settings(optimizer: str) -> dict[str, Any]:
    """Of a rule, on all linear layers but the head; with another name where the odd model's is used."""
    params = rule_training.RULES[optimizer]
    named = {"target_modules": ["_proj"], "blocks": ["layers.0.", "q_proj", "mlp"]}
    return {key: named.get(key, value) for key, value in params.items()}


def tensor_configuration(tensor: int, stage: int, optimizer: str, **changes: Any) -> dict[str, Any]:
    """A DeepSpeed JSON of one rule, with so many tensor-parallel ranks."""
    data = torch.distributed.get_world_size() // tensor
    config = configuration(stage, **changes)
    config["train_batch_size"] = SEQUENCES
    config["train_micro_batch_size_per_gpu"] = SEQUENCES // data
    config["optimizer"] = {"type": optimizer, "params": settings(optimizer)}
    config["megalr"] = {"exchange_bucket_bytes": 20_000, **changes.get("megalr", {})}
    config["tensor_parallel"] = {"autotp_size": tensor}
    return config


def train(
    tensor: int, stage: int, optimizer: str, steps: int = rule_training.STEPS, **changes: Any
) -> tuple[dict[str, Tensor] | None, dict[str, int]]:
    """Train from the start; rank 0 returns the fp32 masters, whole, and every rank its counts."""
    with tensor_parallel_groups():
        config = tensor_configuration(tensor, stage, optimizer, **changes)
        engine = megalr.initialize(model=dense_model(SPREAD), config=config)[0]
        run_steps(engine, rule_training.batches(steps))
        weights = megalr.consolidated_state_dict(engine)
        base = engine.basic_optimizer
        counts = {"calls": base.rule_calls, "updates": base.updates, "bytes": base.bytes_moved}
        engine.destroy()
    return weights, counts


def train_factors(tensor: int, stage: int, **changes: Any) -> dict[str, Tensor] | None:
    """Train low-rank factors with refactorizations and momentum resets; rank 0 returns a dense model's weights."""
    with tensor_parallel_groups():
        config = tensor_configuration(tensor, stage, "AdamW", megalr=LOW_RANK, **changes)
        engine = megalr.initialize(model=dense_model(), config=config)[0]
        run_steps(engine, rule_training.batches(FACTOR_STEPS))
        return finish(engine, config)


@contextmanager
def tensor_parallel_groups() -> Iterator[None]:
    """DeepSpeed makes its tensor-parallel groups once a process; forget them, for engines of another size."""
    from deepspeed.utils import groups

    try:
        yield
    finally:
        groups.mpu = None
        groups._TENSOR_MODEL_PARALLEL_GROUP = groups._MODEL_PARALLEL_GROUP = groups._DATA_PARALLEL_GROUP = None
        groups.mesh_device = None

