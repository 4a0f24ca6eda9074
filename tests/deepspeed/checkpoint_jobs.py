"""What the ranks run in the tests of checkpoints of a user's own jobs."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR

import megalr
from megalr.checkpoint.contents import Contents
from megalr.checkpoint.manifest import LATEST
from megalr.checkpoint.storage import FolderWriter
from tests.deepspeed import checkpointing
from tests.deepspeed.rule_training import batches, everything
from tests.deepspeed.training import configuration, run_steps, same

SCHEDULES: dict[str, Callable[[Any], Any] | None] = {
    "none": None,
    "StepLR": lambda optimizer: StepLR(optimizer, 2, 0.5),
    "WarmupLR": lambda optimizer: deepspeed.runtime.lr_schedules.WarmupLR(optimizer, 0.0, 0.02, 8, "linear"),
}


class Net(nn.Module):
    """Two layers, and whatever else a test wants.

    Args:
        empty: a frozen parameter without elements.
        empty_trained: a trained one, which DeepSpeed takes at stage 0.
        spectrum: a persistent buffer of complex numbers.
        extra: a module with a state of its own.
        statistics: a persistent buffer.
    """

    def __init__(
        self,
        *,
        empty: bool = False,
        empty_trained: bool = False,
        spectrum: bool = False,
        extra: bool = False,
        statistics: bool = False,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 4))
        if empty_trained:
            self.none = nn.Parameter(torch.zeros(0, 12))
        if empty:
            self.frozen = nn.Parameter(torch.zeros(3, 0), requires_grad=False)
        if spectrum:
            self.register_buffer("spectrum", torch.zeros(3, dtype=torch.complex64))
        if statistics:
            self.register_buffer("mean", torch.zeros(3))
        if extra:
            self.layers.append(_Stateful())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out.square().mean()


class _Stateful(nn.Identity):
    def get_extra_state(self) -> int:
        return 1

    def set_extra_state(self, state: int) -> None:
        pass


RULES: dict[str, dict[str, Any]] = {"GaLoreAdamW": {"rank": 2}, "BAdam": {"switch_interval": 100}}


def engine_of(
    stage: int,
    schedule: str = "none",
    *,
    lr: float = 0.01,
    targets: list[str] | None = None,
    rule: str = "GaLoreAdamW",
    gradient_accumulation_steps: int = 1,
    **net: bool,
) -> Any:
    """A fresh model under a fresh engine; a rule for the layers of ``targets``, AdamW without."""
    config = configuration(stage, optimizer={"type": "AdamW", "params": {"lr": lr}})
    config["gradient_accumulation_steps"] = gradient_accumulation_steps
    config["train_batch_size"] *= gradient_accumulation_steps
    if targets:
        config["optimizer"] = {"type": rule, "params": {"lr": lr, "target_modules": targets, **RULES[rule]}}
    config["megalr"] = {}
    more = {} if SCHEDULES[schedule] is None else {"lr_scheduler": SCHEDULES[schedule]}
    return megalr.initialize(model=Net(**net), config=config, **more)[0]


def steps(engine: Any, count: int) -> list[float]:
    """So many updates; the learning rate after each."""
    rates = []
    for _ in range(count):
        engine.backward(engine(torch.ones(2, 12)))
        engine.step()
        rates.append(engine.get_lr()[0])
    return rates


def other_schedule(stage: int, folder: str, saved: str, now: str) -> dict[str, Any]:
    """Save with one schedule, load with another."""
    first = engine_of(stage, saved)
    steps(first, 4)
    rate = first.get_lr()[0]
    megalr.save_checkpoint(first, folder)
    weights = megalr.consolidated_state_dict(first)
    goes_on = steps(first, 4)
    first.destroy()
    second = engine_of(stage, now, lr=0.03 if now == "none" else 0.01)
    before = second.get_lr()[0]
    with warnings_of() as said:
        loaded = megalr.load_checkpoint(second, folder)
    found = megalr.consolidated_state_dict(second)
    after = second.get_lr()[0]
    same = all(torch.equal(value, found[name]) for name, value in (weights or {}).items())
    rates = steps(second, 4)
    second.destroy()
    return {
        "dropped": loaded.dropped,
        "said": said,
        "same": same,
        "rates": (rate, before, after),
        "goes_on": rates == goes_on,
    }


def empty_parameters(stage: int, folder: str) -> tuple[int, int]:
    """Save and load a model some of whose parameters have no elements; updates of either."""
    net = {"empty": True, "empty_trained": stage == 0}
    first = engine_of(stage, **net)
    steps(first, 2)
    megalr.save_checkpoint(first, folder)
    second = engine_of(stage, **net)
    updates = megalr.load_checkpoint(second, folder).updates
    steps(second, 1)
    return updates, second.basic_optimizer.updates


def refused(stage: int, folder: str, what: str) -> str:
    """The message of a save that must fail."""
    engine = engine_of(stage, spectrum=what == "spectrum")
    if what in ("optimizer", "inner"):
        plain = {"train_batch_size": torch.distributed.get_world_size(), "zero_optimization": {"stage": stage}}
        net = Net()
        inner = megalr.build_optimizer(net.layers, {"optimizer": {"type": "AdamW"}})
        optimizer = inner if what == "inner" else torch.optim.AdamW(net.parameters())
        plain["zero_allow_untested_optimizer"] = True
        engine = deepspeed.initialize(model=net, optimizer=optimizer, config=plain)[0]
    if what == "inner":
        with pytest.raises(megalr.UserError, match="built for another module"):
            megalr.consolidated_state_dict(engine)
        with pytest.raises(megalr.UserError, match="built for another module"):
            megalr.attach_guard(engine)
    try:
        megalr.save_checkpoint(engine, folder)
    except megalr.UserError as error:
        return str(error)
    return ""


def other_targets(
    stage: int, folder: str, saved: list[str], now: list[str], rule: str, fails: int | None = None
) -> tuple[str, bool]:
    """The message of a load by a rule for other layers, or that fails on one rank, and whether all is as it was."""
    engine = engine_of(stage, targets=saved, rule=rule)
    steps(engine, 3)
    megalr.save_checkpoint(engine, folder)
    engine = engine_of(stage, targets=now, rule=rule)
    steps(engine, 2)
    before, message, check = everything(engine), "", Contents._check_places

    def fail(*args: Any) -> None:
        if torch.distributed.get_rank() == fails:
            raise OSError("no such device")

    Contents._check_places = fail  # type: ignore[method-assign]
    try:
        megalr.load_checkpoint(engine, folder)
    except megalr.UserError as error:
        message = str(error)
    except OSError as error:
        message = str(error)
    finally:
        Contents._check_places = check  # type: ignore[method-assign]
    after = everything(engine)
    steps(engine, 1)
    return message, before.keys() == after.keys() and all(same(value, after[key]) for key, value in before.items())


def compiled(stage: int, folder: str, pairs: list[tuple[str, str]]) -> list[str]:
    """What goes on differently where a run with one kind of model goes on from another's checkpoint."""
    expected, wrong = {}, []
    for kind in {kind for pair in pairs for kind in pair}:
        engine = compiled_engine(kind, stage)
        steps(engine, 3)
        megalr.save_checkpoint(engine, folder, tag=kind)
        steps(engine, 2)
        expected[kind] = megalr.consolidated_state_dict(engine) or {}
        engine.destroy()
    for saved, now in pairs:
        engine = compiled_engine(now, stage)
        megalr.load_checkpoint(engine, folder, tag=saved)
        steps(engine, 2)
        found = megalr.consolidated_state_dict(engine) or {}
        engine.destroy()
        if found.keys() != expected[saved].keys():
            wrong.append(f"{saved} -> {now}: {sorted(found)}")
        wrong += [f"{saved} -> {now}: {n}" for n, w in expected[saved].items() if not torch.equal(found.get(n, w), w)]
    return wrong


def compiled_engine(kind: str, stage: int) -> Any:
    """A low-rank model with refactorizations: plain, compiled before there is an engine, or by the engine."""
    config = configuration(stage)
    layers = {"type": "low_rank", "rank": 2, "target_modules": ["layers"]}
    config["megalr"] = {"parametrization": layers, "refactorization": {"interval": 2}}
    net: Any = Net()
    engine = megalr.initialize(model=torch.compile(net, backend="eager") if kind == "before" else net, config=config)[0]
    if kind == "engine":
        engine.compile(backend="eager")
    return engine


def begun(stage: int, folder: str) -> str:
    """The message of a load in mid-update."""
    engine = engine_of(stage, gradient_accumulation_steps=3)
    steps(engine, 3)
    megalr.save_checkpoint(engine, folder)
    steps(engine, 2)
    try:
        megalr.load_checkpoint(engine, folder)
    except megalr.UserError as error:
        return str(error)
    return ""


def other_groups(stage: int, folder: str, schedule: str) -> tuple[list[float], list[float], str]:
    """Learning rates after an update of AdamW that goes on from GaLore's, what they should be, and what is dropped."""
    first = engine_of(stage, schedule, targets=["layers.1"], lr=0.02)
    steps(first, 3)
    megalr.save_checkpoint(first, folder)
    found, position = engine_of(stage, schedule, lr=0.01), 3 if schedule == "WarmupLR" else 0
    dropped = megalr.load_checkpoint(found, folder).dropped
    expected = engine_of(stage, schedule, lr=0.01)
    steps(expected, position)
    rates = [[group["lr"] for group in engine.optimizer.param_groups] for engine in (found, expected)]
    steps(found, 1)
    return rates[0], rates[1], dropped


def own_statistics(stage: int, folder: str) -> list[float]:
    """A buffer that each rank has made on its own, after a load."""
    engine = engine_of(stage, statistics=True)
    engine.module.mean.fill_(1.0 + torch.distributed.get_rank())
    megalr.save_checkpoint(engine, folder)
    engine.module.mean.zero_()
    megalr.load_checkpoint(engine, folder)
    found: list[float] = engine.module.mean.tolist()
    return found


def converted_by_deepspeed(method: str, stage: int, folder: str) -> list[str]:
    """Names of weights that zero_to_fp32 makes otherwise of DeepSpeed's own checkpoint, or not at all; of rank 0."""
    engine = checkpointing.engine_of(method, 1, stage)
    run_steps(engine, batches(2))
    engine.save_checkpoint(folder)
    weights = megalr.consolidated_state_dict(engine)
    engine.destroy()
    if weights is None:
        return []
    converted = get_fp32_state_dict_from_zero_checkpoint(folder)
    return [n for n, w in weights.items() if n not in converted or not torch.equal(converted[n].reshape(w.shape), w)]


def ways_to_name(stage: int, folder: str) -> tuple[list[int], list[str]]:
    """Updates of what is loaded by the folder, a checkpoint's own and after a change of ``latest``; what is said."""
    engine = engine_of(stage)
    steps(engine, 1)
    first = megalr.save_checkpoint(engine, folder)
    steps(engine, 1)
    megalr.save_checkpoint(engine, folder)
    with warnings_of() as said:
        updates = [megalr.load_checkpoint(engine, place).updates for place in (folder, first)]
        torch.distributed.barrier()
        (Path(folder) / LATEST).write_text(first.name)
        updates.append(megalr.load_checkpoint(engine, folder).updates)
    return updates, said


def load_at_once(stage: int, folder: str) -> int:
    """Updates of what is loaded while the only checkpoint is still being written."""
    engine, go_on, write_file = engine_of(stage), threading.Event(), FolderWriter._write
    steps(engine, 1)

    def wait_and_write(writer: FolderWriter, plan: Any, planner: Any) -> Any:
        assert go_on.wait(60)
        return write_file(writer, plan, planner)

    FolderWriter._write = wait_and_write  # type: ignore[method-assign]
    try:
        megalr.save_checkpoint(engine, folder, asynchronous=True)
        threading.Timer(0.2, go_on.set).start()
        return megalr.load_checkpoint(engine, folder).updates
    finally:
        FolderWriter._write = write_file  # type: ignore[method-assign]


def extra_state(stage: int, folder: str) -> list[str]:
    """What is said of a module whose own state is not kept."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        megalr.save_checkpoint(engine_of(stage, extra=True), folder)
    return [str(each.message) for each in caught if "get_extra_state" in str(each.message)]


@contextmanager
def warnings_of() -> Iterator[list[str]]:
    """What loading says in the log meanwhile."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("megalr.checkpoint.loading")
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)
