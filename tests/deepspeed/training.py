"""What the ranks run in the training tests: a LLaMA of odd sizes under DeepSpeed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import megalr
from megalr.config.settings import MegalrConfig
from megalr.layers import densify
from tests import equality
from tests.references.parametrizations import low_rank
from tests.small_llama import VOCABULARY, small_llama

SEQUENCES, LENGTH = 24, 16  # 24 sequences a step split over 1, 2, 3 ranks x 1, 4 micro-batches
MEGALR, ADAMW = low_rank.MEGALR, low_rank.ADAMW
CLIPPING = equality.CLIPPING


dense_model = small_llama  # the same in every process, before parametrization


def batches(steps: int) -> list[Tensor]:
    """Token ids of each step's global batch, (SEQUENCES, LENGTH)."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, VOCABULARY, (SEQUENCES, LENGTH), generator=generator) for _ in range(steps)]


def configuration(stage: int, accumulation: int = 1, **changes: Any) -> dict[str, Any]:
    """A DeepSpeed JSON for the current world size; ``changes`` are merged in, section by section."""
    micro = SEQUENCES // accumulation // dist.get_world_size()
    config: dict[str, Any] = {
        "train_batch_size": SEQUENCES,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": CLIPPING,
        "steps_per_print": 10**9,
        # Without persistence every parameter is cut at stage 3, and small buckets hold few of them.
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 10_000, "stage3_param_persistence_threshold": 0},
        "optimizer": {"type": "AdamW", "params": ADAMW},
        "megalr": MEGALR,
    }
    config = copy.deepcopy(config)
    for section, values in changes.items():
        if isinstance(values, dict):
            config[section] = {**config.get(section, {}), **values}
        else:
            config[section] = values
    return config


def engine_of(config: dict[str, Any]) -> Any:
    """A fresh model under a fresh engine."""
    return megalr.initialize(model=dense_model(), config=config)[0]


def run_steps(engine: Any, data: list[Tensor], tensor: int | None = None) -> None:
    """One update for each global batch, of which this rank takes its rows; all tensor-parallel ranks the same."""
    tensor = tensor or max(1, engine.autotp_size())
    rank, world = dist.get_rank() // tensor, dist.get_world_size() // tensor
    micro = engine.train_micro_batch_size_per_gpu()
    for ids in data:
        for a in range(engine.gradient_accumulation_steps()):
            begin = (a * world + rank) * micro
            rows = ids[begin : begin + micro]
            loss = engine(input_ids=rows, labels=rows).loss
            engine.backward(loss)
            engine.step()


def train(stage: int, accumulation: int = 1, steps: int = 20, **changes: Any) -> dict[str, Tensor] | None:
    """Train from the start; rank 0 returns the fp32 masters as a dense model's weights."""
    config = configuration(stage, accumulation, **changes)
    engine = engine_of(config)
    run_steps(engine, batches(steps))
    return finish(engine, config)


def finish(engine: Any, config: dict[str, Any]) -> dict[str, Tensor] | None:
    """Collect dense weights on rank 0 and release the engine."""
    state = megalr.consolidated_state_dict(engine)
    engine.destroy()
    return None if state is None else densify(state, MegalrConfig.from_json(config).parametrization)


def count_updates(stage: int, steps: int, **changes: Any) -> list[int]:
    """Updates that the optimizer and its two clocks have counted after ``steps`` steps without events."""
    engine = engine_of(configuration(stage, megalr={"refactorization": None, "momentum_reset": None}, **changes))
    run_steps(engine, batches(steps))
    optimizer = engine.basic_optimizer
    counts = [optimizer.updates, *(clock.count for clock in optimizer.clocks.values())]
    engine.destroy()
    return counts


def refactorize_once(stage: int, **changes: Any) -> dict[str, float | int] | None:
    """One update with learning rate 0 and a refactorization at its end; what changed, seen on rank 0.

    Weights, and so logits and products, must stay; the factors must balance and must not be what they were.
    """
    section = {**MEGALR, "refactorization": {"interval": 1, "moments": "reset"}, "momentum_reset": None}
    frozen = {"type": "AdamW", "params": {"lr": 0.0}}
    engine = engine_of(configuration(stage, optimizer=frozen, megalr=section, **changes))
    ids = batches(1)[0][: SEQUENCES // dist.get_world_size()]
    before = megalr.consolidated_state_dict(engine)
    logits_before = _logits(engine, ids)
    layout = engine.basic_optimizer.prepare().layout
    cut = sum(len(layout.of(name)) > 1 for name in layout.shapes if name.endswith((".A", ".B")))
    loss = engine(input_ids=ids, labels=ids).loss
    engine.backward(loss)
    engine.step()
    logits_after = _logits(engine, ids)
    after = megalr.consolidated_state_dict(engine)
    published = _published(engine)
    engine.destroy()
    if before is None or after is None:
        return None
    report: dict[str, float | int] = {"product": 0.0, "balance": 0.0, "moved": 1.0, "cut_factors": cut}
    for name, b in after.items():
        if name.endswith(".B"):
            a = after[f"{name[:-1]}A"]
            old = before[name] @ before[f"{name[:-1]}A"]
            report["product"] = max(report["product"], _relative(b @ a, old))
            report["balance"] = max(report["balance"], _relative(b.T @ b, a @ a.T))
            report["moved"] = min(report["moved"], _relative(b, before[name]))
    report["logits"] = (logits_after - logits_before).abs().max().item()
    report["published"] = max(
        (published[n].float() - w.to(published[n].dtype).float()).abs().max().item() for n, w in after.items()
    )
    return report


def _logits(engine: Any, ids: Tensor) -> Tensor:
    engine.eval()
    with torch.no_grad():
        logits = engine(input_ids=ids).logits.float()
    engine.train()
    return logits


def _published(engine: Any) -> dict[str, Tensor]:
    """The weights that the model computes with, whole."""
    import deepspeed

    weights = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            weights[name] = parameter.detach().clone()
    return weights


def _relative(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


def resume(stage: int, folder: str, **changes: Any) -> list[str]:
    """Ten updates, a checkpoint, ten more; the last ten again from the checkpoint. Names of what differs in a bit."""
    config = configuration(stage, scheduler=WARMUP_COSINE, **changes)
    return lost_by_resuming(lambda: engine_of(config), batches(20), 10, folder, everything)


def lost_by_resuming(
    start: Callable[[], Any], data: list[Tensor], cut: int, folder: str, look: Callable[[Any], dict[str, Any]]
) -> list[str]:
    """Names of what differs at the end when the run is cut after ``cut`` updates and goes on from a checkpoint.

    Args:
        start: makes a fresh engine.
        data: token ids of each update.
        cut: updates before the checkpoint.
        folder: of the checkpoint.
        look: all that training depends on, by name.
    """
    engine = start()
    run_steps(engine, data[:cut])
    engine.save_checkpoint(folder)
    run_steps(engine, data[cut:])
    uninterrupted = look(engine)
    engine.destroy()
    engine = start()
    engine.load_checkpoint(folder)
    run_steps(engine, data[cut:])
    resumed = look(engine)
    engine.destroy()
    if uninterrupted.keys() != resumed.keys():
        return sorted(uninterrupted.keys() ^ resumed.keys())
    return [key for key, value in uninterrupted.items() if not same(value, resumed[key])]


def everything(engine: Any) -> dict[str, Any]:
    """All that training depends on, of this rank: weights, masters, moments, counts, schedule."""
    optimizer = engine.basic_optimizer
    shard = optimizer.prepare()
    seen: dict[str, Any] = {f"weight {n}": p.detach().clone() for n, p in engine.module.named_parameters()}
    if hasattr(next(engine.module.parameters()), "ds_id"):
        seen = {f"weight {n}": p.ds_tensor.detach().clone() for n, p in engine.module.named_parameters()}
    seen.update({f"master {i}": buffer.clone() for i, buffer in enumerate(shard.buffers)})
    for key in ("exp_avg", "exp_avg_sq"):
        seen.update({f"{key} {i}": moment.clone() for i, moment in enumerate(optimizer.moments(key))})
    seen["counts"] = (optimizer.updates, {name: vars(clock).copy() for name, clock in optimizer.clocks.items()})
    seen["rates"] = engine.get_lr()
    seen["schedule"] = copy.deepcopy(engine.lr_scheduler.state_dict())
    seen["steps"] = engine.global_steps
    return seen


def same(first: Any, second: Any) -> bool:
    """Bit for bit."""
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    return bool(first == second)


WARMUP_COSINE = {
    "type": "WarmupCosineLR",
    "params": {"total_num_steps": 20, "warmup_num_steps": 4, "warmup_type": "linear", "cos_min_ratio": 0.1},
}
