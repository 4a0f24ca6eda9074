"""What the ranks run in the tests of models that somebody changes after the engine was made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

import megalr
from megalr.hosts import gather, is_partitioned
from megalr.hosts.deepspeed_config import deepspeed_section
from tests.deepspeed import tensor_training
from tests.deepspeed.rule_training import batches, engine_of, everything, rule_configuration
from tests.deepspeed.training import ADAMW, run_steps, same
from tests.odd_model import OddModel, odd_model

BF16 = {"bf16": {"enabled": True}}
Undo = Callable[[], None]
FACTOR, ROW, VALUE = 2.0, 3, 1.5  # what is written: a matrix times a factor, a row of the embedding


def freeze(model: OddModel) -> Undo:
    return _requires(model.mlp_tall.weight, False)


def freeze_on_one_rank(model: OddModel) -> Undo:
    return _requires(model.norm.bias, dist.get_rank() == 0)


def unfreeze(model: OddModel) -> Undo:
    return _requires(model.mlp_square.weight, True)


def add(model: OddModel) -> Undo:
    model.extra = nn.Linear(3, 3, bias=False)
    return lambda: delattr(model, "extra")


def remove(model: OddModel) -> Undo:
    return _puts(model.mlp_tall, "bias", None)


def replace(model: OddModel) -> Undo:
    return _puts(model.norm, "weight", nn.Parameter(torch.ones(20)))


def untie(model: OddModel) -> Undo:
    return _puts(model.lm_head, "weight", nn.Parameter(torch.zeros(61, 20)))


def tie(model: OddModel) -> Undo:
    return _puts(model.mlp_tall, "bias", model.mlp_wide.weight)


def cast(model: OddModel) -> Undo:
    before = {p: p.data for p in model.parameters()}
    model.to(torch.float64)

    def undo() -> None:
        for parameter, data in before.items():
            parameter.data = data

    return undo


def reassign(model: OddModel) -> Undo:
    parameter, before = model.norm.weight, model.norm.weight.data
    parameter.data = torch.full((20,), 7.0, dtype=before.dtype)
    return lambda: setattr(parameter, "data", before)


def write(model: OddModel) -> Undo:
    return _times(model.mlp_wide.weight, lambda weight, factor: weight.mul_(factor))


def write_data(model: OddModel) -> Undo:
    return _times(model.norm.weight, lambda weight, factor: weight.data.copy_(weight.data * factor))


def write_on_one_rank(model: OddModel) -> Undo:
    factor = FACTOR if dist.get_rank() == dist.get_world_size() - 1 else 1.0
    weights = [p for p in model.parameters() if p.requires_grad]  # some of which this rank has a part of
    for weight in weights:
        weight.data.mul_(factor)

    def undo() -> None:
        for weight in weights:
            weight.data.div_(factor)

    return undo


CHANGES = {
    each.__name__: each
    for each in (
        freeze,
        freeze_on_one_rank,
        unfreeze,
        add,
        remove,
        replace,
        untie,
        tie,
        cast,
        reassign,
        write,
        write_data,
        write_on_one_rank,
    )
}


def _requires(parameter: nn.Parameter, wanted: bool) -> Undo:
    before = parameter.requires_grad
    parameter.requires_grad_(wanted)

    def undo() -> None:
        parameter.requires_grad_(before)

    return undo


def _puts(layer: nn.Module, name: str, parameter: nn.Parameter | None) -> Undo:
    before = getattr(layer, name)
    setattr(layer, name, parameter)
    return lambda: setattr(layer, name, before)


def _times(weight: nn.Parameter, scale: Callable[[Tensor, float], Any]) -> Undo:
    """Scale a weight in some way, at stage 3 inside of what gathers it."""

    def act(factor: float) -> None:
        with opened(weight), torch.no_grad():
            scale(weight, factor)

    act(FACTOR)
    return lambda: act(1 / FACTOR)


def opened(*weights: nn.Parameter) -> Any:
    """Where weights are whole, and what is written into them is kept."""
    return deepspeed.zero.GatheredParameters(list(weights), modifier_rank=0, enabled=is_partitioned(weights[0]))


def said(act: Callable[[], Any]) -> str:
    """The words of the error; empty where there is none."""
    try:
        act()
    except megalr.UserError as error:
        return str(error)
    return ""


def changed(stage: int, folder: str, **changes: Any) -> dict[str, Any]:
    """Two updates, and then changes, each undone again, an update, and two changes that are met by the engine.

    Returns:
        What a check before an update says of each change, and after it was undone; what the engine says.
    """
    engine = engine_of(rule_configuration(stage, "Muon", **changes), frozen=True, tied=True)
    optimizer, data = engine.basic_optimizer, batches(4)
    run_steps(engine, data[:2])
    found: dict[str, Any] = {"undone": ""}
    for name, change in CHANGES.items():
        undo = change(engine.module)
        found[name] = said(optimizer.check_model)
        undo()
        found["undone"] += said(optimizer.check_model)
    unfreeze(engine.module)
    found["saved"] = said(lambda: megalr.save_checkpoint(engine, folder))
    found["consolidated"] = said(lambda: megalr.consolidated_state_dict(engine))
    found["files"] = sorted(path.name for path in Path(folder).iterdir()) if Path(folder).exists() else []
    _requires(engine.module.mlp_square.weight, False)
    run_steps(engine, data[2:3])
    undo = freeze_on_one_rank(engine.module)
    found["at backward"] = said(lambda: run_steps(engine, data[3:]))
    undo()
    write(engine.module)
    before = everything(engine)
    found["at step"] = said(lambda: run_steps(engine, data[3:]))
    found["moved"] = [key for key, held in everything(engine).items() if not same(held, before[key])]
    if found["at step"]:  # before the engine has begun the step, which can be made again
        megalr.adopt_weights(engine)
        engine.step()
    found["updates"] = optimizer.updates
    engine.destroy()
    return found


def adopted(stage: int, way: str, **changes: Any) -> tuple[list[str], dict[str, Tensor] | None]:
    """Two updates, weights written in some way and adopted, an update.

    Returns:
        What is not as it should be after the adoption, by name; the masters at the end.
    """
    engine = engine_of(rule_configuration(stage, "Muon", **changes), frozen=True)
    data, model = batches(3), engine.module
    run_steps(engine, data[:2])
    before, old = everything(engine), _whole_masters(engine)
    expected = dict(old)
    dtype = model.mlp_wide.weight.dtype
    expected["mlp_wide.weight"] = (
        old["mlp_wide.weight"].to(torch.float32 if way == "tensors" else dtype).float() * FACTOR
    )
    expected["embed_tokens.weight"] = old["embed_tokens.weight"].clone()
    expected["embed_tokens.weight"][ROW] = VALUE
    written = {name: expected[name] for name in ("mlp_wide.weight", "embed_tokens.weight")}
    frozen = torch.full((20, 20), 0.25)
    if way == "tensors":
        mine = written | {"mlp_square.weight": frozen} if dist.get_rank() == 0 else None
        megalr.adopt_weights(engine, mine)
    elif way == "masters":
        for name, value in written.items():
            deepspeed.utils.safe_set_full_fp32_param(model.get_parameter(name), value)
        megalr.adopt_weights(engine, masters=True)
    else:
        weights = [model.mlp_wide.weight, model.embed_tokens.weight, model.mlp_square.weight]
        with opened(*weights) if way == "opened" else torch.no_grad():
            weights[0].data.mul_(FACTOR)
            weights[1].data[ROW] = VALUE
            weights[2].data.copy_(frozen)
        megalr.adopt_weights(engine)
    now, after = _whole_masters(engine), everything(engine)
    wrong = [f"master of {name}" for name, value in expected.items() if not torch.equal(value, now[name])]
    wrong += [
        key for key, held in before.items() if not key.startswith(("weight", "master")) and not same(held, after[key])
    ]
    with gather(model.parameters()):
        for name, parameter in model.named_parameters():
            value = expected.get(name, frozen)
            if name in expected or way != "masters":
                wrong += [] if torch.equal(parameter.detach(), value.to(dtype)) else [f"weight of {name}"]
    run_steps(engine, data[2:])
    masters = _whole_masters(engine)
    if all(torch.equal(masters[name], now[name]) for name in now):
        wrong.append("nothing moved")
    engine.destroy()
    return wrong, masters if dist.get_rank() == 0 else None


def refused_adoptions(stage: int) -> dict[str, str]:
    """Adoptions that are refused, and what is different afterwards."""
    engine = engine_of(rule_configuration(stage, "Muon", accumulation=2))
    before, model = everything(engine), engine.module
    found = {
        "name": said(lambda: megalr.adopt_weights(engine, {"mlp_wide.wight": torch.zeros(20, 37)})),
        "shape": said(lambda: megalr.adopt_weights(engine, {"mlp_wide.weight": torch.zeros(37, 20)})),
    }
    undo = write_on_one_rank(model)
    found["ranks"] = said(lambda: megalr.adopt_weights(engine))
    undo()
    ids = batches(1)[0][:12]
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step()
    found["begun"] = said(lambda: megalr.adopt_weights(engine))
    found["changed"] = " ".join(key for key, held in everything(engine).items() if not same(held, before[key]))
    engine.destroy()
    return found


def _whole_masters(engine: Any) -> dict[str, Tensor]:
    """All masters on every rank."""
    optimizer = engine.basic_optimizer
    shard = optimizer.prepare()
    return {name: optimizer.exchange.everywhere(name, shard.buffers) for name in shard.layout.shapes}


def frozen_late(stage: int, **changes: Any) -> dict[str, Any]:
    """A weight frozen between ``megalr.build_optimizer`` and ``deepspeed.initialize``, and one frozen after both."""
    config, data, found = rule_configuration(stage, "Muon", **changes), batches(2), {}
    for when in ("before", "after"):
        model = odd_model()
        optimizer = megalr.build_optimizer(model, config)
        weight = model.mlp_wide.weight
        start = weight.detach().clone()
        weight.requires_grad_(when != "before")
        engine = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_section(config))[0]
        weight.requires_grad_(False)
        found[when] = said(lambda engine=engine: run_steps(engine, data))
        if when == "before":
            with gather([weight]):
                found["still"] = torch.equal(weight.detach(), start.to(weight.dtype))
            state = megalr.consolidated_state_dict(engine)
            found["missing"] = [] if state is None else sorted({n for n, _ in model.named_parameters()} - state.keys())
        engine.destroy()
    return found


def loaded(stage: int, folder: str) -> list[str]:
    """What is said after a checkpoint was loaded over weights that were written, and as often as some are written.

    A checkpoint of DeepSpeed's, and one of megalr's.
    """
    found, data = [], batches(2)
    for own in (False, True):
        engine = engine_of(rule_configuration(stage, "Muon", **BF16))
        run_steps(engine, data[:1])
        if not found:
            engine.save_checkpoint(f"{folder}/theirs")
            megalr.save_checkpoint(engine, f"{folder}/ours")
        write(engine.module)
        if own:
            megalr.load_checkpoint(engine, f"{folder}/ours")
        else:
            engine.load_checkpoint(f"{folder}/theirs")
        found.append(said(engine.basic_optimizer.check_model))
        undo = write(engine.module)
        found.append(said(engine.basic_optimizer.check_model)[:13])
        undo()
        found.append(said(lambda engine=engine: run_steps(engine, data[1:])))
        write(engine.module)
        found.append(said(engine.basic_optimizer.check_model)[:13])
        engine.destroy()
    return found


def adopted_tensor(stage: int, parametrization: dict[str, Any] | None) -> tuple[list[str], str]:
    """Tensor-parallel ranks adopt what each has in its model, and then whole tensors of rank 0.

    Returns:
        What is not as it should be, by name; what is said of a parameter that is frozen on the last rank.
    """
    with tensor_training.tensor_parallel_groups():
        config = tensor_training.tensor_configuration(2, stage, "GaLoreAdamW")
        if parametrization is not None:
            config["optimizer"] = {"type": "AdamW", "params": ADAMW}
            config["megalr"] = {"parametrization": parametrization}
        engine = megalr.initialize(model=tensor_training.dense_model(), config=config)[0]
        model, data = engine.module, batches(3)
        run_steps(engine, data[:1])
        wrong: list[str] = []
        for way in ("model", "tensors"):
            old = megalr.consolidated_state_dict(engine)
            expected = None if old is None else {name: value * FACTOR for name, value in old.items()}
            if way == "model":
                weights = list(model.parameters())
                with opened(*weights):
                    for weight in weights:
                        weight.data.mul_(FACTOR)
                megalr.adopt_weights(engine)
            else:
                megalr.adopt_weights(engine, expected)
            now = megalr.consolidated_state_dict(engine)
            if now is not None and expected is not None:
                wrong += [f"{way}: {name}" for name, value in expected.items() if not torch.equal(value, now[name])]
        run_steps(engine, data[1:2])
        last = [p for p in model.parameters() if p.requires_grad][-1]
        last.requires_grad_(dist.get_rank() != dist.get_world_size() - 1)
        words = said(lambda: run_steps(engine, data[2:]))
        engine.destroy()
    return wrong, words
