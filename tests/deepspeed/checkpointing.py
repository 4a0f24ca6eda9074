"""What the ranks run in the tests of checkpoints that move between layouts."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, is_tensor

import megalr
from megalr.checkpoint.manifest import MANIFEST, read_manifest, write_manifest
from megalr.checkpoint.reading import read_tensor
from megalr.checkpoint.storage import FolderReader
from megalr.rules.quantized_state import fp32_state
from tests.deepspeed import rule_training
from tests.deepspeed.rule_training import everything
from tests.deepspeed.tensor_training import (
    LOW_RANK,
    SLTRAIN,
    SPREAD,
    dense_model,
    projected,
    tensor_configuration,
    tensor_parallel_groups,
)
from tests.deepspeed.training import WARMUP_COSINE, finish, run_steps, same

RELORA = {
    "type": "relora",
    "rank": 4,
    "merge_every": 4,
    "restart_warmup_steps": 2,
    "merge_rounding": "remainder",
    "target_modules": ["mlp"],
}
BEFORE, AFTER = 11, 5  # updates; of low-rank layers there is a refactorization and a reset on either side

# Name: the optimizer, and the "megalr" section.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "low-rank": ("AdamW", LOW_RANK),
    "projected": ("AdamW", {"parametrization": projected("input")}),
    "GaLore": ("GaLoreAdamW", {}),
    "Fira": ("FiraAdamW", {}),
    "Muon": ("Muon", {}),
    "SLTrain": ("AdamW", SLTRAIN),
    "ReLoRA": (
        "AdamW",
        {"parametrization": RELORA},
    ),
    "SwitchLoRA": ("AdamW", {"parametrization": {"type": "switchlora", "rank": 4, "target_modules": ["mlp"]}}),
    "VeLoRA": ("AdamW", {"activations": {"groups": 6, "target_modules": ["attn"]}}),
    "Q-GaLore": ("QGaLoreAdamW", {}),
}


def engine_of(method: str, tensor: int, stage: int, frozen: tuple[str, ...] = (), **changes: Any) -> Any:
    """A fresh model under a fresh engine; parameters with one of these parts in their names are not trained."""
    optimizer, section = METHODS[method]
    config = tensor_configuration(tensor, stage, optimizer, megalr=section, scheduler=WARMUP_COSINE, **changes)
    model = dense_model(0.02 if method in ("low-rank", "SLTrain") else SPREAD)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in frozen))
    return megalr.initialize(model=model, config=config)[0]


def save(method: str, tensor: int, stage: int, folder: str, **changes: Any) -> dict[str, Tensor] | None:
    """Train, save, train on; what rank 0 has at the end."""
    with tensor_parallel_groups():
        engine = engine_of(method, tensor, stage, **changes)
        run_steps(engine, rule_training.batches(BEFORE))
        megalr.save_checkpoint(engine, folder, client_state={"position": BEFORE})
        return _go_on(engine)


def load(
    method: str, tensor: int, stage: int, folder: str, copy: str, **changes: Any
) -> tuple[dict[str, Tensor] | None, str]:
    """Load, save again at once, train on; what rank 0 has at the end, and what was dropped."""
    with tensor_parallel_groups():
        engine = engine_of(method, tensor, stage, **changes)
        run_steps(engine, rule_training.batches(2))  # what is loaded replaces what was there
        loaded = megalr.load_checkpoint(engine, folder)
        assert loaded.client_state == {"position": BEFORE}
        megalr.save_checkpoint(engine, copy, client_state=loaded.client_state)
        return _go_on(engine), loaded.dropped


def lost(method: str, tensor: int, stage: int, folder: str, asynchronous: bool = False, **changes: Any) -> list[str]:
    """Names of what differs in a bit at the end when a run goes on from a checkpoint, at the same layout."""
    data = rule_training.batches(BEFORE + AFTER)
    with tensor_parallel_groups():
        engine = engine_of(method, tensor, stage, **changes)
        run_steps(engine, data[:BEFORE])
        megalr.save_checkpoint(engine, folder, asynchronous=asynchronous)
        run_steps(engine, data[BEFORE:])
        megalr.wait_for_checkpoint()
        expected = _all(engine)
        engine.destroy()
        engine = engine_of(method, tensor, stage, **changes)
        megalr.load_checkpoint(engine, folder)
        run_steps(engine, data[BEFORE:])
        got = _all(engine)
        engine.destroy()
    return sorted(got.keys() ^ expected.keys()) or [k for k, v in expected.items() if not same(v, got[k])]


def _all(engine: Any) -> dict[str, Any]:
    seen = everything(engine)
    seen |= {f"buffer {name}": buffer.clone() for name, buffer in engine.module.named_buffers()}
    seen["rates"], seen["steps"], seen["schedule"] = (
        engine.get_lr(),
        engine.global_steps,
        engine.lr_scheduler.state_dict(),
    )
    seen["random"] = torch.rand(3)
    return seen


def _go_on(engine: Any) -> dict[str, Tensor] | None:
    run_steps(engine, rule_training.batches(BEFORE + AFTER)[BEFORE:])
    return finish(engine, engine.basic_optimizer.sections)


def refused(
    method: str, tensor: int, stage: int, folder: str, tag: str | None = None, **changes: Any
) -> tuple[str, bool]:
    """The message of a load that must fail, and whether everything is as it was before."""
    with tensor_parallel_groups():
        engine = engine_of(method, tensor, stage, **changes)
        run_steps(engine, rule_training.batches(2))
        before, message = _all(engine), ""
        torch.rand(0)
        try:
            megalr.load_checkpoint(engine, folder, tag)
        except megalr.UserError as error:
            message = str(error)
        after = _all(engine)
        engine.destroy()
    return message, all(same(v, after[k]) for k, v in before.items() if k != "random")


def drawn(tensor: int, folder: str, save: bool) -> tuple[int, int]:
    """What Python and torch draw next on a rank, after a save from a seed of its own, or after a load."""
    with tensor_parallel_groups():
        engine = engine_of("Muon", tensor, 1)
        random.seed(dist.get_rank())
        torch.manual_seed(dist.get_rank() if save else 7)
        if save:
            megalr.save_checkpoint(engine, folder)
        else:
            megalr.load_checkpoint(engine, folder)
        found = random.getrandbits(30), int(torch.randint(1 << 30, ()))
        engine.destroy()
    return found


def load_stored(method: str, stage: int, folder: str, params: dict[str, Any]) -> tuple[str, dict[str, float]]:
    """Load states that were stored in another dtype: what was dropped, and how far what they stand for has changed."""
    optimizer, section = METHODS[method]
    config = tensor_configuration(1, stage, optimizer, megalr=section, scheduler=WARMUP_COSINE)
    config["optimizer"]["params"] |= params
    engine = megalr.initialize(model=dense_model(SPREAD), config=config)[0]
    loaded = megalr.load_checkpoint(engine, folder)
    manifest, errors = read_manifest(loaded.folder), {}
    updater = engine.basic_optimizer.matrices
    for m in (m for m in updater.matrices if m.name in updater.states):
        saved: dict[str, Any] = dict(manifest.content["numbers"]["matrices"][m.name])
        for key in (key for key in manifest.tensors if key.startswith(f"rule/{m.name}/")):
            saved[key.rpartition("/")[2]] = read_tensor(manifest, key)
        now, fresh = updater.states[m.name], m.rule.init_state(m.shape)
        assert {key: _kind(value) for key, value in now.items()} == {key: _kind(value) for key, value in fresh.items()}
        assert [now[key] for key in ("step", "refreshes")] == [saved[key] for key in ("step", "refreshes")]
        before, after = (fp32_state(m.rule, state, m.shape) for state in (saved, now))
        errors[m.name] = max(
            float((after[k] - v).abs().max() / v.abs().max()) for k, v in before.items() if is_tensor(v)
        )
    run_steps(engine, rule_training.batches(3))
    assert engine.basic_optimizer.updates == loaded.updates + 3
    engine.destroy()
    return loaded.dropped, errors


def _kind(value: Any) -> Any:
    return (value.dtype, value.shape) if is_tensor(value) else type(value)


def load_other(method: str, stage: int, folder: str) -> tuple[str, dict[str, Any], dict[str, Tensor] | None]:
    """Load what another rule has saved: what was dropped, what is left of counts and states, and the weights."""
    engine = engine_of(method, 1, stage)
    run_steps(engine, rule_training.batches(2))
    loaded = megalr.load_checkpoint(engine, folder)
    optimizer = engine.basic_optimizer
    left = {
        "updates": optimizer.updates,
        "steps": engine.global_steps,
        "counts": {name: clock.count for name, clock in optimizer.clocks.items()},
        "states": len(optimizer.matrix_states),
        "moments": sum(flat.numel() for key in ("exp_avg", "exp_avg_sq") for flat in optimizer.moments(key)),
    }
    weights = megalr.consolidated_state_dict(engine)
    run_steps(engine, rule_training.batches(3))
    assert optimizer.updates == loaded.updates + 3  # noqa: PLR2004
    engine.destroy()
    return loaded.dropped, left, weights


def replaced(stage: int, folder: str) -> list[str]:
    """Messages of a load before which one process alone finds another save, with the same tensors, in the place."""
    engine, place = engine_of("low-rank", 1, stage), next(path.parent for path in Path(folder).glob("*/manifest.json"))
    read, messages = FolderReader.read_data, []

    def replace_and_read(self: FolderReader, *args: Any) -> Any:
        if dist.get_rank() == 1:
            new, old = place.with_name(".new"), place.with_name(".old")
            content = json.loads((place / MANIFEST).read_text())["content"]
            shutil.copytree(place, new)
            write_manifest(new, {**content, "written": content["written"] + 1})
            place.rename(old)
            new.rename(place)
            shutil.rmtree(old)
        return read(self, *args)

    for function in (replace_and_read, read):
        FolderReader.read_data = function  # type: ignore[method-assign]
        try:
            messages.append(f"{megalr.load_checkpoint(engine, folder).updates} updates")
        except megalr.UserError as error:
            messages.append(str(error))
    engine.destroy()
    return messages
