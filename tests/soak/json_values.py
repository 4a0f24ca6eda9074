"""The JSON, one value of it wrong: of another type, out of range, beyond numbers, misspelt, or given twice."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from random import Random
from typing import Any, Literal

from megalr.config.reading import SECTIONS
from megalr.config.sections import GeneralConfig, GroupConfig, OptimizerConfig
from megalr.layers.registry import PARAMETRIZATIONS
from megalr.rules.registry import RULES, hyperparameters
from tests.soak.trial import Case
from tests.soak.workshop import TRAIN, good_config

HOLE = "@@"  # stands in a configuration where a raw value goes
LONG = "9" * 5000
NUMBERS_NO_FLOAT_HOLDS = ("NaN", "Infinity", "-1e400", "1" + "0" * 400, LONG)
AGAIN = 3  # values tried of a key that another section has as well

# Raw JSON that is wrong for a type, whatever its limits.
WRONG: dict[str, tuple[str, ...]] = {
    "int": ('"3"', '""', '"x"', "null", "1.5", "true", "[]", "[3]", "{}", "NaN", "-Infinity", "1e400", LONG),
    "float": ('"0.1"', '""', '"x"', "null", "false", "[]", "[0.1]", "{}", *NUMBERS_NO_FLOAT_HOLDS),
    "bool": ('"true"', '"no"', '"x"', "0", "1", "2", "null", "[]", "{}"),
    "choice": ('"nonsense"', '""', "1", "true", "null", "[]", "{}", '["x"]', LONG),
    "floats": ("0.9", "[]", "[0.9]", '["0.9", 0.9]', "[null, 0.9]", "[NaN, 0.9]", "{}", '"x"', "null", "true"),
    "names": ('""', "[]", '[""]', "[1]", "[null]", "{}", "1", "true", "[[]]", '"("', '["nowhere"]'),
    "section": ("1", '"x"', "true", "[]", "[{}]", '{"nonsense": 1}'),
    "text": ("1", "true", "[]", "{}", "null"),
}
NEEDED = {"random_from": 1, "rank": 8}  # by some rules, for the small model
# The least that a number may be, where it is not 1 of whole ones and 0 of others; None for no limit.
LEAST: dict[str, float | None] = {
    "allgather_bucket_size": 0,
    "autotp_size": 0,
    "check_replicas_every": 0,
    "cos_threshold": -1,
    "frozen_steps": 0,
    "initial_scale_power": 0,
    "max_skipped": 0,
    "min_8bit_size": 0,
    "random_from": 0,
    "reset_interval": 0,
    "restart_warmup_steps": 0,
    "seed": None,
    "stage": 0,
    "stage3_max_live_parameters": 0,
    "stage3_param_persistence_threshold": 0,
    "stage3_prefetch_bucket_size": 0,
    "warmup_steps": 0,
}
# Values that look wrong and are not.
RIGHT: dict[str, tuple[str, ...]] = {"mora_type": ("1",), "plugins": ("[]",)}


@dataclasses.dataclass(frozen=True)
class Key:
    """A place in the JSON.

    Attributes:
        path: to it.
        kind: one of :data:`WRONG`.
        content: a configuration that has it, valid but for what is put there.
        optional: whether null is right.
    """

    path: tuple[str, ...]
    kind: str
    content: Mapping[str, Any]
    optional: bool = False

    @property
    def values(self) -> Iterator[str]:
        """Raw JSON that is wrong there."""
        name = self.path[-1]
        least = LEAST.get(name, {"int": 1, "float": 0}.get(self.kind))
        below = [] if least is None else [str(least - 1), str(-(2**70))]
        for value in (*WRONG[self.kind], *below):
            if value not in RIGHT.get(name, ()) and not (value == "null" and self.optional):
                yield value

    def case(self, value: str) -> Case:
        """A run whose JSON has the value there."""
        text = json.dumps(_put(self.content, self.path, HOLE)).replace(f'"{HOLE}"', value)
        return _case(f"{'.'.join(self.path)} = {value[:40]}", text, self.path[-1], "bad.json", "nonsense")


def wrong_values(rng: Random) -> Iterator[Case]:
    """Every key of ours and what we read of DeepSpeed's, with values of other types and beyond its limits."""
    seen: set[str] = set()
    for key in keys():
        values = list(key.values)
        if key.path[-1] in seen:
            values = rng.sample(values, min(AGAIN, len(values)))
        seen.add(key.path[-1])
        yield from map(key.case, values)


def wrong_names(rng: Random) -> Iterator[Case]:
    """Every key misspelt, and every key twice."""
    for key in keys():
        *parents, name = key.path
        for spelt in _misspelt(name, rng):
            place = (*parents, spelt)
            content = _put(_without(key.content, key.path), place, _example(key.content, key.path))
            yield _case(f"{'.'.join(place)} instead of {name}", json.dumps(content), spelt, f'"{name}"')
    for path in _paths(good_config()):
        value = json.dumps(_at(good_config(), path))
        text = json.dumps(_put(good_config(), path, HOLE)).replace(f'"{HOLE}"', f'{value}, "{path[-1]}": {value}')
        yield _case(f"{'.'.join(path)} twice", text, path[-1])


def keys() -> Iterator[Key]:
    """All places."""
    dense = {**good_config(), "megalr": {}, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}
    yield from _fields(OptimizerConfig, ("optimizer", "params"), dense, ["lr", "betas", "eps", "weight_decay"])
    for group in ("embedding", "norm"):
        yield from _fields(GroupConfig, ("optimizer", "params", group), dense)
    yield from _fields(GeneralConfig, ("megalr",), dense)
    for name, rule in RULES.items():
        if rule is not None:
            needed = {key: value for key, value in NEEDED.items() if key in hyperparameters(rule)}
            content = {**dense, "optimizer": {"type": name, "params": needed}}
            yield from _fields(rule, ("optimizer", "params"), content, hyperparameters(rule))
            yield from _fields(OptimizerConfig, ("optimizer", "params"), content, ["head", "target_modules"])
            yield from _fields(GroupConfig, ("optimizer", "params", "adamw"), content, ["lr"])
    for name, kind in PARAMETRIZATIONS.items():
        if name != "full":
            content = {**dense, "megalr": {"parametrization": {"type": name, "rank": 8}}}
            yield from _fields(kind, ("megalr", "parametrization"), content)
    for name, section in SECTIONS.items():
        needed = {"interval": 2, "warmup_steps": 1} if name == "momentum_reset" else {}
        needed = {"interval": 2} if name == "refactorization" else needed
        content = good_config()
        content["megalr"] = {"parametrization": content["megalr"]["parametrization"], name: needed}
        yield from _fields(section, ("megalr", name), content)
        yield Key(("megalr", name), "section", content, optional=True)
    for path, kind in DEEPSPEEDS.items():
        place = tuple(path.split("."))
        content = good_config()
        if place[0] == "scheduler" and place[-1] in SCHEDULES:
            content["scheduler"] = SCHEDULES[place[-1]]
            if content["scheduler"]["type"] == "StepLR":  # DeepSpeed makes it around a bare optimizer alone
                content |= {"zero_optimization": {"stage": 0}, "bf16": {"enabled": False}}
        yield Key(place, kind.removesuffix("?"), content, optional=kind.endswith("?"))


# What of DeepSpeed's sections is read by it or by us, and its type; "?" where null is right.
DEEPSPEEDS = {
    "train_batch_size": "int?",
    "train_micro_batch_size_per_gpu": "int?",
    "gradient_accumulation_steps": "int?",
    "gradient_clipping": "float?",
    "steps_per_print": "int?",
    "prescale_gradients": "bool",
    "gradient_predivide_factor": "float",
    "wall_clock_breakdown": "bool",
    "memory_breakdown": "bool",
    "dump_state": "bool",
    "communication_data_type": "choice?",
    "zero_allow_untested_optimizer": "bool",
    "optimizer": "section",
    "optimizer.type": "choice",
    "optimizer.params": "section",
    "scheduler": "section?",
    "scheduler.type": "choice",
    "scheduler.params": "section?",
    "scheduler.params.total_num_steps": "int",
    "scheduler.params.warmup_num_steps": "int",
    "scheduler.params.warmup_min_ratio": "float",
    "scheduler.params.cos_min_ratio": "float",
    "scheduler.params.warmup_type": "choice",
    "scheduler.params.warmup_min_lr": "float",
    "scheduler.params.warmup_max_lr": "float?",
    "scheduler.params.step_size": "int",
    "scheduler.params.gamma": "float",
    "megalr": "section?",
    "megalr.parametrization": "section",
    "bf16": "section?",
    "bf16.enabled": "bool",
    "fp16": "section?",
    "fp16.enabled": "bool",
    "fp16.loss_scale": "float",
    "fp16.initial_scale_power": "int",
    "fp16.loss_scale_window": "int",
    "torch_autocast": "section?",
    "torch_autocast.enabled": "bool",
    "torch_autocast.dtype": "choice",
    "data_types": "section?",
    "data_types.grad_accum_dtype": "choice?",
    "zero_optimization": "section?",
    "zero_optimization.stage": "int",
    "zero_optimization.reduce_bucket_size": "int",
    "zero_optimization.allgather_bucket_size": "int",
    "zero_optimization.overlap_comm": "bool?",
    "zero_optimization.reduce_scatter": "bool",
    "zero_optimization.contiguous_gradients": "bool",
    "zero_optimization.round_robin_gradients": "bool",
    "zero_optimization.sub_group_size": "int",
    "zero_optimization.offload_optimizer": "section?",
    "zero_optimization.offload_optimizer.device": "choice",
    "zero_optimization.offload_optimizer.pin_memory": "bool",
    "zero_optimization.offload_param.device": "choice",
    "zero_optimization.stage3_max_live_parameters": "int",
    "zero_optimization.stage3_prefetch_bucket_size": "int",
    "zero_optimization.stage3_param_persistence_threshold": "int",
    "zero_optimization.zero_hpz_partition_size": "int",
    "tensor_parallel": "section?",
    "tensor_parallel.autotp_size": "int",
    "activation_checkpointing": "section?",
    "activation_checkpointing.partition_activations": "bool",
    "tensorboard": "section?",
    "tensorboard.enabled": "bool",
    "tensorboard.output_path": "text",
    "tensorboard.job_name": "text",
    "csv_monitor": "section?",
    "csv_monitor.enabled": "bool",
    "csv_monitor.output_path": "text",
}
SCHEDULES = {
    "warmup_min_lr": {"type": "WarmupLR", "params": {"warmup_num_steps": 2}},
    "warmup_max_lr": {"type": "WarmupLR", "params": {"warmup_num_steps": 2}},
    "step_size": {"type": "StepLR", "params": {"step_size": 2}},
    "gamma": {"type": "StepLR", "params": {"step_size": 2}},
}


def _fields(
    cls: type, path: tuple[str, ...], content: Mapping[str, Any], only: Sequence[str] | None = None
) -> Iterator[Key]:
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if only is None or field.name in only:
            kind, optional = _kind(hints[field.name])
            if field.name in ("type", "plugins"):
                kind = "choice"
            if field.name == "target_modules":
                kind = "names"
            yield Key((*path, field.name), kind, content, optional)


def _kind(hint: Any) -> tuple[str, bool]:
    """Which of :data:`WRONG`, and whether null is right."""
    options = [hint]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        options = list(typing.get_args(hint))
    optional = type(None) in options
    first = next(option for option in options if option is not type(None))
    if typing.get_origin(first) is Literal:
        return "choice", optional
    if typing.get_origin(first) is tuple:
        return ("floats" if typing.get_args(first)[0] is float else "names"), optional
    return {int: "int", float: "float", bool: "bool", str: "text"}[first], optional


def _case(about: str, text: str, *names: str) -> Case:
    return Case(about=about, words=(*TRAIN, "--deepspeed", "bad.json"), names=names, files={"bad.json": text})


def _misspelt(name: str, rng: Random) -> list[str]:
    """A letter missing, and two exchanged."""
    place = rng.randrange(1, len(name))
    exchanged = name[: place - 1] + name[place] + name[place - 1] + name[place + 1 :]
    return [spelt for spelt in (name[:place] + name[place + 1 :], exchanged) if spelt != name]


def _put(content: Mapping[str, Any], path: Sequence[str], value: Any) -> dict[str, Any]:
    first, *rest = path
    inner = content.get(first)
    return {**content, first: _put(inner if isinstance(inner, Mapping) else {}, rest, value) if rest else value}


def _without(content: Mapping[str, Any], path: Sequence[str]) -> dict[str, Any]:
    first, *rest = path
    if not rest or not isinstance(content.get(first), Mapping):
        return {key: value for key, value in content.items() if key != first}
    return {**content, first: _without(content[first], rest)}


def _at(content: Any, path: Sequence[str]) -> Any:
    for key in path:
        content = content[key]
    return content


def _example(content: Mapping[str, Any], path: Sequence[str]) -> Any:
    try:
        return _at(content, path)
    except KeyError:
        return 1


def _paths(content: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in content.items():
        yield (*above, key)
        if isinstance(value, Mapping):
            yield from _paths(value, (*above, key))
