"""What the ranks run in the memory tests: engines between two micro-batches, measured and computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import megalr
from megalr.config.settings import LowRankConfig
from megalr.layers import parametrize
from megalr.memory.formulas import (
    RankBytes,
    buffer_bytes,
    deepspeed_bytes,
    expected_bytes,
    frozen_shapes,
    measured_bytes,
    merged_shapes,
)
from megalr.optim.groups import parameter_groups

MODELS = Path(__file__).parents[2] / "launchers" / "models"
THRESHOLD = 60  # at stage 3 the small model's matrices are cut, its other parameters persistent
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Setting(NamedTuple):
    """One way to run DeepSpeed."""

    stage: int
    dtype: str = "fp32"
    gradients: str = "fp32"


class Counts(NamedTuple):
    """The bytes of one rank, from three sources that have to agree."""

    measured: RankBytes
    formula: RankBytes  # of the shapes as they were before DeepSpeed saw them
    of_engine: RankBytes  # the formula, applied to what the engine says of itself


def small_model(settings: list[Setting]) -> dict[Setting, Counts]:
    """Every setting on a model of odd shapes: one of its groups is smaller than the world."""
    counts = {}
    for setting in settings:
        model = nn.Sequential(nn.Linear(7, 13), nn.Linear(13, 11, bias=False), nn.LayerNorm(11), nn.Linear(11, 1))
        counts[setting] = _count(model, {"input": torch.ones(2, 7, dtype=DTYPES[setting.dtype])}, setting)
    return counts


def sixty_million() -> Counts:
    """The shipped 60M shape at rank 128 and stage 2."""
    model = LlamaForCausalLM(LlamaConfig.from_json_file(MODELS / "60m.json"))
    parametrize(model, LowRankConfig(rank=128))
    ids = torch.arange(8).view(1, 8)
    return _count(model, {"input_ids": ids, "labels": ids}, Setting(stage=2))


def with_megalr(stage: int, parametrization: str = "low_rank", dtype: str = "fp32") -> tuple[RankBytes, RankBytes]:
    """Measured and computed for a LLaMA with factors under megalr's own optimizer."""
    engine = _trained(stage, parametrization, dtype)
    measured, computed = measured_bytes(engine), expected_bytes(engine)
    engine.destroy()
    return measured, computed


def with_remainders(stage: int, parametrization: str, **section: Any) -> Counts:
    """The same in bf16, all weights merged once; the formula is that of the model as it was planned."""
    engine = _trained(stage, parametrization, "bf16", merge_rounding="remainder", **section)
    measured, of_engine = measured_bytes(engine), expected_bytes(engine)
    settings = engine.basic_optimizer.config
    planned = parametrize(_llama(), settings.parametrization)
    formula = deepspeed_bytes(
        [[tuple(p.shape) for p in g.parameters.values()] for g in parameter_groups(planned, settings.optimizer)],
        stage=stage,
        world_size=engine.world_size,
        rank=engine.global_rank,
        dtype=torch.bfloat16,
        persistence_threshold=THRESHOLD,
        frozen=frozen_shapes(planned),
        buffers=buffer_bytes(planned),
        merged=merged_shapes(planned, settings.parametrization),
    )
    engine.destroy()
    return Counts(measured, formula, of_engine)


def _trained(stage: int, parametrization: str, dtype: str, **section: Any) -> Any:
    config = _configuration(Setting(stage, dtype, dtype))
    section = {"type": parametrization, "rank": 5, **section}
    config |= {"optimizer": {"type": "AdamW"}, "megalr": {"parametrization": section}}
    engine, *_ = megalr.initialize(model=_llama(), config=config)
    ids = torch.arange(8).view(1, 8)
    _train(engine, {"input_ids": ids, "labels": ids})
    return engine


def _llama() -> LlamaForCausalLM:
    shape = {"hidden_size": 20, "intermediate_size": 33, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**shape, vocab_size=61))


def _count(model: nn.Module, batch: dict[str, Tensor], setting: Setting) -> Counts:
    """Under torch's AdamW, with matrices, vectors and scalars in a group each."""
    import deepspeed

    kinds: dict[int, list[nn.Parameter]] = {2: [], 1: [], 0: []}
    for parameter in model.parameters():
        kinds[parameter.squeeze().ndim].append(parameter)
    parameters = [group for group in kinds.values() if group]
    shapes = [[tuple(p.shape) for p in group] for group in parameters]
    optimizer = torch.optim.AdamW([{"params": group} for group in parameters], lr=1e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=_configuration(setting))
    _train(engine, batch)
    formula = deepspeed_bytes(
        shapes,
        stage=setting.stage,
        world_size=engine.world_size,
        rank=engine.global_rank,
        dtype=DTYPES[setting.dtype],
        gradient_dtype=DTYPES[setting.gradients],
        persistence_threshold=THRESHOLD,
    )
    counts = Counts(measured_bytes(engine), formula, expected_bytes(engine))
    engine.destroy()
    return counts


def _configuration(setting: Setting) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": setting.stage,
            "reduce_bucket_size": 10_000_000,
            "stage3_param_persistence_threshold": THRESHOLD,
        },
        "bf16": {"enabled": setting.dtype == "bf16"},
        "data_types": {"grad_accum_dtype": setting.gradients},
    }


def _train(engine: Any, batch: dict[str, Tensor]) -> None:
    """One step of two micro-batches, and the first micro-batch of the next."""
    for _ in range(3):
        output = engine(**batch)
        engine.backward(output.loss if hasattr(output, "loss") else output.float().square().mean())
        engine.step()
