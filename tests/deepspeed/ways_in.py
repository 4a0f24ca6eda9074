"""What the ranks run in the tests of the three ways in: one model, data and settings, handed over in each of them."""

from __future__ import annotations

import gc
import logging
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import LlamaForCausalLM, Trainer, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import megalr
from megalr.optim import advice
from megalr.optim.state import kept_entries
from tests.deepspeed.training import CLIPPING, SEQUENCES, batches, configuration, run_steps
from tests.small_llama import small_llama

ACCUMULATION = 2
SETTINGS = {"lr": 3e-3, "betas": [0.9, 0.95], "eps": 1e-7, "weight_decay": 0.1}
AUTO = dict.fromkeys(SETTINGS, "auto")
Json = dict[str, Any]


def initialize(model: str, steps: int, stage: int, optimizer: Json, megalr_section: Json) -> Any:
    """The first way: all of it from the JSON."""
    config = configuration(stage, ACCUMULATION, optimizer=_filled(optimizer))
    config["megalr"] = megalr_section
    return _train(megalr.initialize(model=_model(model), config=config)[0], steps)


def instance(model: str, steps: int, stage: int, optimizer: Json, megalr_section: Json) -> Any:
    """The second: an optimizer handed to a stock ``deepspeed.initialize``."""
    return _train(_stock_engine(model, stage, optimizer, megalr_section, as_callable=False), steps)


def callable_(model: str, steps: int, stage: int, optimizer: Json, megalr_section: Json) -> Any:
    """The second, with a callable that DeepSpeed calls for its optimizer."""
    return _train(_stock_engine(model, stage, optimizer, megalr_section, as_callable=True), steps)


def trainer(model: str, steps: int, stage: int, optimizer: Json, megalr_section: Json) -> Any:
    """The third: transformers' Trainer, which fills every "auto"."""
    job = make_trainer(model, Path(model).parent, stage, optimizer, megalr_section, max_steps=steps)
    job.train()
    return _finish(job.model_wrapped)


def plugged_in(model: str, stage: int, *, as_stock: bool, move: tuple[int, ...] | None = None) -> Json:
    """What a user sees who gives all parameters, a model under zero.Init and a schedule that sets all rates.

    Args:
        move: arguments of a step of the schedule before training.
    """
    scheduler = {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-3, "warmup_num_steps": 20}}
    optimizer = {"type": "GaLoreAdamW", "params": {**SETTINGS, "rank": 5}}
    config = configuration(stage, ACCUMULATION, optimizer=optimizer, scheduler=scheduler)
    config["megalr"] = {}
    with deepspeed.zero.Init(config_dict_or_path={"train_batch_size": SEQUENCES}, enabled=stage == 3):
        net = LlamaForCausalLM(small_llama().config)
    advice._warn.cache_clear()  # a process says a thing once
    log: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: log.append(record.getMessage())  # type: ignore[method-assign]
    loggers = [logging.getLogger(name) for name in ("megalr", "DeepSpeed")]
    loggers[0].setLevel(logging.INFO)
    for each in loggers:
        each.addHandler(handler)
    if as_stock:
        config["megalr"] = {"optimizer": config.pop("optimizer")}
        given = megalr.build_optimizer(net, config)
        engine = deepspeed.initialize(
            model=net, optimizer=given, config={**config, "zero_allow_untested_optimizer": True}
        )[0]
    else:
        engine = megalr.initialize(model=net, model_parameters=net.parameters(), config=config)[0]
    for each in loggers:
        each.removeHandler(handler)
    if move is not None:
        engine.lr_scheduler.step(*move)
    rates = []
    for ids in batches(3):
        rates.append(engine.basic_optimizer.learning_rates())
        run_steps(engine, [ids])
    summary = engine.basic_optimizer.summary()
    _release(engine)
    return {"log": "\n".join(log), "rates": rates, "summary": summary}


def make_trainer(
    model: str,
    folder: Path,
    stage: int,
    optimizer: Json,
    megalr_section: Json,
    *,
    zero: Json | None = None,
    sections: Json | None = None,
    as_optimizers: bool = False,
    **more: Any,
) -> Trainer:
    """A Trainer over the rows of ``batches()`` in order, so that it sees what ``run_steps`` gives.

    Args:
        zero, sections: added to the configuration's "zero_optimization", and to the configuration.
        as_optimizers: hand over an instance as ``optimizers=``.
        **more: TrainingArguments.
    """
    dense = not megalr_section
    low_rank = None if dense else _model(model)  # must not see zero.Init
    section = {**megalr_section, "optimizer": optimizer}
    config = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": 0,
            **(zero or {}),
        },
        "steps_per_print": 10**9,
        "megalr": section,
        **(sections or {}),
    }
    settings: Json = {
        "per_device_train_batch_size": SEQUENCES // ACCUMULATION // dist.get_world_size(),
        "gradient_accumulation_steps": ACCUMULATION,
        "learning_rate": SETTINGS["lr"],
        "weight_decay": SETTINGS["weight_decay"],
        "adam_beta1": SETTINGS["betas"][0],
        "adam_beta2": SETTINGS["betas"][1],
        "adam_epsilon": SETTINGS["eps"],
        "max_grad_norm": CLIPPING,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **more,
    }
    args = TrainingArguments(output_dir=str(folder / "trainer"), deepspeed=config, use_cpu=True, **settings)
    net = _model(model) if low_rank is None else megalr.parametrize(low_rank, config)
    assert dense or not hasattr(next(net.parameters()), "ds_id")
    rows = [{"input_ids": row, "labels": row} for ids in batches(settings["max_steps"]) for row in ids]
    handed: Json = {"optimizer_cls_and_kwargs": megalr.trainer_optimizer(args)}
    if as_optimizers:
        handed = {"optimizers": (megalr.build_optimizer(net, config, training_args=args), None)}
    return Trainer(net, args, train_dataset=rows, eval_dataset=rows[:8], **handed)


def trainer_settings(model: str, stage: int, **more: Any) -> Json:
    """What two updates of a Trainer were made with."""
    job = make_trainer(model, Path(model).parent, stage, {"type": "Muon", "params": AUTO}, {}, max_steps=2, **more)
    job.train()
    engine = job.model_wrapped
    optimizer = engine.basic_optimizer
    found = {
        "optimizer": type(optimizer).__name__,
        "schedule": type(engine.lr_scheduler).__name__,
        "calls": getattr(optimizer, "rule_calls", 0),
    }
    _release(engine)
    return found


def trainer_resume(model: str, folder: str, stage: int, optimizer: Json, megalr_section: Json) -> list[str]:
    """Eight updates with evaluations, without, and the last four again from a checkpoint; what differs in a bit."""
    job = {"model": model, "stage": stage, "optimizer": optimizer, "megalr_section": megalr_section}
    more = {"max_steps": 8, "lr_scheduler_type": "cosine", "warmup_steps": 2, "save_only_model": False}
    results = []
    for number, (settings, checkpoint) in enumerate(
        [
            ({}, None),
            ({"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 4}, None),
            ({}, f"{folder}/1/trainer/checkpoint-4"),
        ]
    ):
        run = make_trainer(**job, folder=Path(folder) / str(number), **more, **settings)
        run.train(resume_from_checkpoint=checkpoint)
        results.append(_everything(run))
        _release(run.model_wrapped)
    plain, evaluated, resumed = results
    different = [f"evaluation: {key}" for key in _differences(plain, evaluated)]
    return different + [f"resume: {key}" for key in _differences(evaluated, resumed)]


def stock_resume(model: str, folder: str, stage: int, optimizer: Json, megalr_section: Json) -> list[str]:
    """Four updates, a checkpoint, four more; the last four again, with a load, save and load before any update."""
    data = batches(8)
    engine = _stock_engine(model, stage, optimizer, megalr_section, as_callable=False)
    run_steps(engine, data[:4])
    engine.save_checkpoint(f"{folder}/first")
    run_steps(engine, data[4:])
    whole = _state(engine)
    _release(engine)
    for source, target in (("first", "second"), ("second", None)):
        engine = _stock_engine(model, stage, optimizer, megalr_section, as_callable=False)
        engine.load_checkpoint(f"{folder}/{source}")
        if target:
            engine.save_checkpoint(f"{folder}/{target}")
            _release(engine)
    run_steps(engine, data[4:])
    different = _differences(whole, _state(engine))
    _release(engine)
    return different


def foreign(model: str, stages: list[int]) -> list[str]:
    """What each of some engines says that train layers of ours by DeepSpeed's AdamW; ours is there, and left out."""
    said = []
    for stage in stages:
        section = {"parametrization": {"type": "low_rank", "rank": 5}, "refactorization": {"interval": 4}}
        config = configuration(stage, optimizer={"params": {"lr": 1e-3, "torch_adam": True}})
        config["megalr"] = section
        net = megalr.parametrize(_model(model), {"megalr": section})
        ours = megalr.build_optimizer(net, {"megalr": section}) if stage else None
        engine = deepspeed.initialize(model=net, model_parameters=net.parameters(), config=config)[0]
        try:
            run_steps(engine, batches(1))
            said.append("")
        except megalr.UserError as error:
            said.append(str(error))
        del ours
        _release(engine)
    return said


def _stock_engine(model: str, stage: int, optimizer: Json, megalr_section: Json, *, as_callable: bool) -> Any:
    config = configuration(stage, ACCUMULATION)
    del config["optimizer"]
    config["megalr"] = {**megalr_section, "optimizer": _filled(optimizer)}
    config["zero_allow_untested_optimizer"] = True
    net = megalr.parametrize(_model(model), config)
    given = (lambda _: megalr.build_optimizer(net, config)) if as_callable else megalr.build_optimizer(net, config)
    return deepspeed.initialize(model=net, optimizer=given, config=config)[0]


def _filled(optimizer: Json) -> Json:
    return {**optimizer, "params": {**optimizer["params"], **SETTINGS}}


def _model(folder: str) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


def _train(engine: Any, steps: int) -> Any:
    run_steps(engine, batches(steps))
    return _finish(engine)


def _finish(engine: Any) -> tuple[dict[str, Tensor] | None, int, int]:
    """Whole weights on rank 0; rule calls on this rank; updates."""
    state, optimizer = megalr.consolidated_state_dict(engine), engine.basic_optimizer
    _release(engine)
    return state, optimizer.rule_calls, optimizer.updates


def _release(engine: Any) -> None:
    engine.destroy()
    unset_hf_deepspeed_config()
    gc.collect()


def _everything(job: Trainer) -> dict[str, Any]:
    schedule = {key: value for key, value in job.lr_scheduler.state_dict().items() if key != "lr_lambdas"}
    return {**_state(job.model_wrapped), "steps": job.state.global_step, **_flat(schedule, "schedule")}


def _state(engine: Any) -> dict[str, Any]:
    """This rank's masters and all that the optimizer keeps, by path."""
    optimizer = engine.basic_optimizer
    shard = optimizer.prepare()
    # Not state_dict(): outside of its own save and load, DeepSpeed leaves no parameters in the groups of stage 3.
    moments = {id(parameter): state for parameter, state in optimizer.state.items()}
    found: dict[str, Any] = {
        "masters": shard.buffers,
        "moments": [moments.get(id(p), {}) for p in shard.parameters],
        "matrices": optimizer.matrix_states,
        "layers": {} if optimizer.layer_events is None else optimizer.layer_events.numbers(),
        "kept": {k: [p.data for p in entry.pieces] for k, entry in kept_entries(optimizer).items()},
        "clocks": {name: vars(clock) for name, clock in optimizer.clocks.items()},
        "updates": optimizer.updates,
        "settings": [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups],
    }
    return _flat(found, "state")


def _flat(value: Any, path: str) -> dict[str, Any]:
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {where: leaf for key, each in items for where, leaf in _flat(each, f"{path}.{key}").items()}
    return {path: value.clone() if isinstance(value, Tensor) else value}


def _differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    if one.keys() != other.keys():
        return sorted(one.keys() ^ other.keys())
    return [key for key, value in one.items() if not _same(value, other[key])]


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    return bool(one == other)
