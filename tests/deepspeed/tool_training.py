"""What the ranks run in the tests of the checkpoints' command line: a few updates, a checkpoint, what was in it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import groups
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import megalr
from tests.deepspeed import rule_training
from tests.deepspeed.tensor_training import (
    LOW_RANK,
    MODEL,
    SLTRAIN,
    SPREAD,
    projected,
    tensor_configuration,
    tensor_parallel_groups,
)
from tests.deepspeed.training import VOCABULARY, run_steps

UPDATES = 4
LORA = {"parametrization": {"type": "lora", "rank": 4, "alpha": 6.5}}
RELORA = {
    "parametrization": {
        "type": "relora",
        "rank": 4,
        "merge_every": 3,
        "restart_warmup_steps": 1,
        "merge_rounding": "remainder",
        "target_modules": ["mlp"],
    }
}
BF16 = {"bf16": {"enabled": True}}

# Name: the optimizer, the "megalr" section, what is changed in the model, and in the JSON.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "GaLore": ("GaLoreAdamW", {}, {"tie_word_embeddings": True}, {}),
    "low-rank": ("AdamW", LOW_RANK, {}, {}),
    "projected": ("AdamW", {"parametrization": projected("input")}, {"tie_word_embeddings": True}, BF16),
    "SLTrain": ("AdamW", SLTRAIN, {}, {}),
    "LoRA": ("AdamW", LORA, {"attention_bias": True}, {}),
    "ReLoRA": ("AdamW", RELORA, {}, BF16),
    "CoLA": ("AdamW", {"parametrization": {"type": "cola", "rank": 4}}, {}, {}),
}


def model_of(case: str) -> LlamaForCausalLM:
    """The dense model of a case, the same in every process."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**MODEL | CASES[case][2], initializer_range=SPREAD))


def make(case: str, tensor: int, stage: int, folder: str) -> tuple[dict[str, Tensor], Tensor] | None:
    """Train, save, and return the consolidated weights and the logits of the first sequences; on rank 0."""
    optimizer, section, _, changes = CASES[case]
    with tensor_parallel_groups():
        config = tensor_configuration(tensor, stage, optimizer, megalr=section, **changes)
        engine = megalr.initialize(model=model_of(case), config=config)[0]
        data = rule_training.batches(UPDATES)
        run_steps(engine, data)
        megalr.save_checkpoint(engine, folder, client_state={"position": UPDATES})
        state = megalr.consolidated_state_dict(engine)
        engine.eval()
        with torch.no_grad():
            logits = _whole(engine(input_ids=data[0][:2]).logits.clone())
        engine.destroy()
    return None if state is None else (state, logits)


def _whole(logits: Tensor) -> Tensor:
    """A tied head is cut by vocabulary, and each tensor-parallel rank has the logits of its part."""
    if logits.shape[-1] == VOCABULARY:
        return logits
    group = groups.get_tensor_model_parallel_group()
    parts: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(parts, logits, group=group)
    return torch.cat(parts, dim=-1)


def make_odd(stage: int, folder: str, tags: list[str]) -> dict[str, Tensor] | None:
    """Several checkpoints of a model with a stack of matrices that is none of transformers; the last one's weights."""
    engine = rule_training.engine_of(rule_training.rule_configuration(stage, "Muon"), tied=True)
    for tag, ids in zip(tags, rule_training.batches(len(tags)), strict=True):
        run_steps(engine, [ids])
        megalr.save_checkpoint(engine, folder, tag)
    state = megalr.consolidated_state_dict(engine)
    engine.destroy()
    return state


def make_deepspeed(folder: str) -> None:
    """A checkpoint of DeepSpeed's own."""
    engine = rule_training.engine_of(rule_training.rule_configuration(2, "Muon"))
    engine.save_checkpoint(folder)
    engine.destroy()
    dist.barrier()
