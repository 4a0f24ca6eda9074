"""What the ranks run in the tests of guards: good updates, and a bad one on one rank."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import megalr
from megalr.guards.guard import Guard
from megalr.hosts import held
from megalr.hosts.deepspeed_config import deepspeed_section
from megalr.train import loop
from megalr.train.arguments import parse_arguments
from megalr.train.pretrain import pretrain
from megalr.train.ranks import AgreedError, start_ranks
from tests.deepspeed import projecting, rule_training, tensor_training, training
from tests.deepspeed.pretraining import MODELS
from tests.deepspeed.training import WARMUP_COSINE, run_steps, same
from tests.odd_model import odd_model

NAN = float("nan")
GUARDS = {"spike_deviations": 5.0, "window": 3}  # three losses are enough to judge by
RESTARTS = {"refactorization": {"interval": 2}, "momentum_reset": {"interval": 3, "scope": "all", "warmup_steps": 2}}
# What happens on the last rank in one micro-batch: to the loss, from which gradients come; or to a gradient alone.
ILLS: dict[str, Callable[[Tensor], Tensor]] = {
    "nan": lambda loss: loss * NAN,
    "nan, finite gradients": lambda loss: loss + NAN,
    "spike": lambda loss: loss * 1000,
}


def engine_and_data(method: str, stage: int, accumulation: int = 1, **changes: Any) -> tuple[Any, list[Tensor]]:
    """A fresh engine of a method, and five batches for it."""
    changes["scheduler"] = WARMUP_COSINE
    guards = changes.pop("guards", GUARDS)
    if method == "low_rank":
        config = training.configuration(stage, accumulation, **changes)
        config["megalr"] = {**config["megalr"], **RESTARTS, "guards": guards}
        return training.engine_of(config), training.batches(5)
    if method == "projected":
        config = projecting.projected_configuration(stage, accumulation, section={"update_proj_gap": 4}, **changes)
        config["megalr"]["guards"] = guards
        return projecting.engine_of(config), rule_training.batches(5)
    config = rule_training.rule_configuration(stage, method, accumulation, **changes)
    config["megalr"]["guards"] = guards
    return rule_training.engine_of(config), rule_training.batches(5)


@contextmanager
def ill(engine: Any, kind: str):
    """Inside, the last micro-batch of each update is bad on the last rank."""
    last = engine.is_gradient_accumulation_boundary
    active = dist.get_rank() == dist.get_world_size() - 1
    guarded = engine.backward
    hook = None
    if kind == "gradient":
        parameter = [p for p in engine.module.parameters() if p.requires_grad][-1]
        hook = parameter.register_hook(lambda grad: grad * float("inf")) if active else None
    else:
        engine.backward = lambda loss: guarded(ILLS[kind](loss) if active and last() else loss)
    yield
    engine.backward = guarded
    if hook is not None:
        hook.remove()


def everything(engine: Any, method: str) -> dict[str, Any]:
    """All that training depends on, of this rank."""
    seen = (projecting if method == "projected" else rule_training).everything(engine)
    for name, parameter in engine.module.named_parameters():
        if hasattr(parameter, "ds_tensor"):  # of a frozen one the padding is memory that nobody has written
            seen[f"weight {name}"] = held(parameter)[0][1].detach().clone()
    return seen


def skip(method: str, stage: int, kind: str, good: int = 3, **changes: Any) -> dict[str, Any]:
    """Good updates, a bad one, a good one; and the same without the bad one."""
    engine, data = engine_and_data(method, stage, **changes)
    run_steps(engine, data[:good])
    before = everything(engine, method)
    with ill(engine, kind):
        run_steps(engine, data[3:4])
    after = everything(engine, method)
    guard = engine.megalr_guard
    found = {
        "changed": [key for key, held in before.items() if not same(held, after[key])],
        "reason": guard.last_reason,
        "counts": (guard.skipped, guard.skipped_in_a_row),
        "events": engine.basic_optimizer.last_events,
        "skipped": (engine.skipped_steps, engine.was_step_applied(), engine.basic_optimizer.overflow),
    }
    run_steps(engine, data[4:])
    found["counts after"] = (guard.skipped, guard.skipped_in_a_row)
    seen = everything(engine, method)
    engine.destroy()
    engine, data = engine_and_data(method, stage, **changes)
    run_steps(engine, [*data[:good], *data[4:]])
    expected = everything(engine, method)
    engine.destroy()
    found["differs"] = [key for key, held in expected.items() if not same(held, seen[key])]
    found["moved"] = any(not same(held, seen[key]) for key, held in after.items())
    return found


def exhaust(stage: int, kind: str) -> tuple[int, str]:
    """Bad updates, two of which may follow each other: after how many it ended, with which words."""
    engine, data = engine_and_data("Muon", stage, guards={**GUARDS, "max_skipped": 2})
    run_steps(engine, data[:3])
    with ill(engine, kind):
        run_steps(engine, data[3:])
    run_steps(engine, data[4:])  # and they are counted from the start
    with ill(engine, kind):
        for count in range(1, 10):
            try:
                run_steps(engine, data[3:4])
            except megalr.GuardError as error:
                engine.destroy()
                return count, str(error)
    return 0, ""


def healthy(method: str, stage: int, **changes: Any) -> int:
    """Updates that ranks agreed on, compared after each."""
    engine, data = engine_and_data(method, stage, guards={"check_replicas_every": 1}, **changes)
    run_steps(engine, data)
    updates = engine.basic_optimizer.updates
    engine.destroy()
    return updates


def healthy_tensor(tensor: int, stage: int, parametrization: dict[str, Any] | None) -> int:
    """The same under tensor parallelism."""
    with tensor_training.tensor_parallel_groups():
        section = {} if parametrization is None else {"parametrization": parametrization}
        section |= {"guards": {"check_replicas_every": 1}}
        rule = "GaLoreAdamW" if parametrization is None else "AdamW"
        config = tensor_training.tensor_configuration(tensor, stage, rule, megalr=section)
        if parametrization is not None:
            config["optimizer"] = {"type": "AdamW", "params": training.ADAMW}
        config["megalr"] = section
        engine = megalr.initialize(model=tensor_training.dense_model(), config=config)[0]
        run_steps(engine, rule_training.batches(4))
        updates = engine.basic_optimizer.updates
        engine.destroy()
    return updates


def flip(method: str, stage: int, where: str, rank: int, every: int = 2) -> tuple[int, str]:
    """One bit of a weight is flipped on one rank: how many updates later it was noticed, with which words."""
    engine, data = engine_and_data(method, stage, guards={"check_replicas_every": every})
    run_steps(engine, data[:every])
    if dist.get_rank() == rank:
        weight = dict(engine.module.named_parameters())[where].data.view(-1)
        weight.view(torch.int32)[3] ^= 1 << 12  # the last may be rounded away
    for count in range(1, every + 1):
        try:
            run_steps(engine, data[every : every + 1])
        except megalr.GuardError as error:
            engine.destroy()
            return count, str(error)
    return 0, ""


def go_on(stage: int) -> list[Any]:
    """The state through JSON into a fresh guard, and what both say next."""
    engine, data = engine_and_data("Muon", stage)
    first = engine.megalr_guard
    run_steps(engine, data[:3])
    with ill(engine, "nan"):
        run_steps(engine, data[3:4])
    state = json.loads(json.dumps(first.state_dict()))
    second = Guard(engine)
    second.load_state_dict(state)
    found = [second.state_dict() == first.state_dict(), len(state["losses"]), second.skipped, second.skipped_in_a_row]
    found.append([each._window.objection(1e6) for each in (first, second)])
    engine.destroy()
    return found


def unguarded(stage: int, section: dict[str, Any], bad: int) -> tuple[list[str], int]:
    """A job of its own, without a guard, where activations are no numbers once: what differs from one without that.

    Args:
        stage: of ZeRO.
        section: the JSON's "megalr".
        bad: in which update, on the last rank.
    """
    config = rule_training.rule_configuration(stage, "AdamW", 2, megalr=section, scheduler=WARMUP_COSINE)
    data = rule_training.batches(5)
    seen = []
    for batches in (data, [*data[:bad], *data[bad + 1 :]]):
        model = odd_model()
        megalr.parametrize(model, config)
        optimizer = megalr.build_optimizer(model, config)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_section(config))
        run_steps(engine, batches[:bad])
        active = batches is data and dist.get_rank() == dist.get_world_size() - 1
        hook = engine.module.embed_tokens.register_forward_hook(lambda _, __, x: x * NAN) if active else None
        run_steps(engine, data[bad : bad + 1] if batches is data else [])
        if hook is not None:
            hook.remove()
        run_steps(engine, data[bad + 1 :])
        seen.append(rule_training.everything(engine))
        engine.destroy()
    return [key for key, held in seen[1].items() if not same(held, seen[0][key])], seen[0]["counts"][0]


def boundaries_of_the_user() -> tuple[int, int, float | None]:
    """Three passes and one step, where the user says which is the last; updates, losses seen in the end, their mean."""
    engine, data = engine_and_data("Muon", 2)
    world, micro = dist.get_world_size(), engine.train_micro_batch_size_per_gpu()
    rows = data[0][dist.get_rank() * micro : (dist.get_rank() + 1) * micro]
    for _ in range(2):
        for last in (False, False, True):
            engine.set_gradient_accumulation_boundary(last)
            loss = engine(input_ids=rows, labels=rows).loss
            engine.backward(loss)
        engine.step()
    mean = torch.stack([loss.detach()]).double()
    dist.all_reduce(mean)
    guard = engine.megalr_guard
    found = (engine.basic_optimizer.updates, len(guard.state_dict()["losses"]), guard.loss - mean.item() / world)
    engine.destroy()
    return found


def of_a_job_of_its_own() -> tuple[list[str], str | None, float | None]:
    """``deepspeed.initialize`` by the user, and losses whose backward pass is torch's own."""
    config = rule_training.rule_configuration(1, "Muon")
    model = odd_model()
    optimizer = megalr.build_optimizer(model, config)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_section(config))
    guard = megalr.attach_guard(engine)
    data = rule_training.batches(3)
    run_steps(engine, data[:1])
    with ill(engine, "nan, finite gradients"):
        run_steps(engine, data[1:2])
    events, reason = list(optimizer.last_events), guard.last_reason
    micro = engine.train_micro_batch_size_per_gpu()
    rows = data[2][dist.get_rank() * micro : (dist.get_rank() + 1) * micro]
    engine.scale(engine(input_ids=rows, labels=rows).loss).backward()
    engine.step()
    assert optimizer.updates == 2
    engine.destroy()
    return events, reason, guard.loss


def launcher_ends(flags: list[str], folder: str) -> str:
    """With which words ``launchers/pretrain.py`` ends, if it does so early."""
    os.chdir(folder)
    try:
        pretrain(parse_arguments(flags), start_ranks(), MODELS)
    except AgreedError as error:
        return str(error)
    return ""


def launcher_loses(lost: str, flags: list[str], folder: str) -> tuple[str, list[str]]:
    """:func:`launcher_ends` where something is moved in the middle of the third step, and what else is said."""
    said: list[str] = []
    calls = iter(range(1, 100))
    to_device = loop.to_device

    def lose(batch: Any, device: torch.device) -> Any:
        if next(calls) == 3:
            megalr.wait_for_checkpoint()
            if dist.get_rank() == 0:
                os.rename(lost, "kept")
        return to_device(batch, device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "to_device", lose)
        patch.setattr(loop.Screen, "say", lambda self, text: said.append(text))
        return launcher_ends(flags, folder), said
