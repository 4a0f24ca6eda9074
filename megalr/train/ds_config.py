"""From the JSON that the user wrote, with its "auto" values, to the one DeepSpeed gets. Pure functions.

Order of precedence: a value in the JSON wins over a default, and a flag that contradicts it is an error.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megalr.errors import UserError
from megalr.plugins import absolute_plugin

AUTO = "auto"
WARMUP_SHARE = 0.1  # of the steps

# Sections whose "auto" means something to somebody else.
_OTHERS_AUTO = ("megalr", "optimizer")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What, besides the JSON, decides; a None was not asked for.

    Attributes:
        world_size: number of processes that have data of their own.
        bf16_is_fast: the accelerator computes in bf16 at least as fast as in fp32.
        batch_size, micro_batch_size, steps, seed: the flags.
        default_batch_size, default_steps: where neither the JSON nor a flag says.
        largest_micro_batch: the most sequences a micro-batch gets by default.
        default_rank: of low-rank factors or projections, where the JSON says "auto".
        output: the run's folder, for the monitors.
    """

    world_size: int
    bf16_is_fast: bool
    batch_size: int | None = None
    micro_batch_size: int | None = None
    steps: int | None = None
    seed: int | None = None
    default_batch_size: int
    default_steps: int
    largest_micro_batch: int
    default_rank: int
    output: str = "."


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Sequences of one update: ``total = micro * accumulation * world size``."""

    total: int
    micro: int
    accumulation: int


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """A configuration without "auto", and what the loop needs to know of it.

    Attributes:
        config: the DeepSpeed JSON, "megalr" section included.
        batch: sequences of one update.
        steps: updates of the whole run.
        seed: of the weights and the order of the text.
        bf16: whether weights and activations are bf16.
        notes: choices worth a line on the screen.
    """

    config: dict[str, Any]
    batch: Batch
    steps: int
    seed: int
    bf16: bool
    notes: tuple[str, ...]


def resolve(content: Mapping[str, Any], request: Request) -> Resolved:
    """Replace every "auto".

    Args:
        content: the JSON as the user wrote it; not modified.
        request: see :class:`Request`.

    Raises:
        UserError: sizes that the processes cannot share, a flag against a number, an "auto" that stays.
    """
    config: dict[str, Any] = copy.deepcopy(dict(content))
    notes: list[str] = []
    batch = resolve_batch(config, request, notes)
    config["train_batch_size"] = batch.total
    config["train_micro_batch_size_per_gpu"] = batch.micro
    config["gradient_accumulation_steps"] = batch.accumulation
    bf16 = _resolve_precision(config, request, notes)
    steps = _resolve_schedule(config, request)
    _resolve_rank(config, request, notes)
    seed = _resolve_seed(config, request)
    _resolve_plugins(config)
    _resolve_monitors(config, request)
    _refuse_auto({key: value for key, value in config.items() if key not in _OTHERS_AUTO})
    return Resolved(config=config, batch=batch, steps=steps, seed=seed, bf16=bf16, notes=tuple(notes))


def resolve_batch(config: Mapping[str, Any], request: Request, notes: list[str]) -> Batch:
    """The three batch sizes from whichever of them are given.

    Raises:
        UserError: they contradict each other, a flag, or the number of processes.
    """
    total = _number(config, "train_batch_size", "--batch-size", request.batch_size)
    micro = _number(config, "train_micro_batch_size_per_gpu", "--micro-batch-size", request.micro_batch_size)
    accumulation = _number(config, "gradient_accumulation_steps", None, None)
    world = request.world_size
    unit = world * (micro or 1) * (accumulation or 1)
    if total is None:
        both = micro is not None and accumulation is not None
        total = unit if both else max(1, -(-request.default_batch_size // unit)) * unit
        if not both and total != request.default_batch_size:
            notes.append(f"batch of {total} sequences: {request.default_batch_size} cannot be shared evenly")
    if total % unit:
        parts = [f"{world} process{'es' if world > 1 else ''}"]
        parts += [f"{micro} sequences at a time"] if micro else []
        parts += [f"{accumulation} accumulation steps"] if accumulation else []
        below, above = total // unit * unit, (total // unit + 1) * unit
        sizes = f"{below} or {above}" if below else f"{above}"
        raise UserError(
            f"a batch of {total} sequences cannot be shared evenly by {' x '.join(parts)}: write {sizes} "
            "(train_batch_size in the JSON, or --batch-size)"
        )
    share = total // world
    if micro is None:
        micro = share // accumulation if accumulation else _largest_divisor(share, request.largest_micro_batch)
    accumulation = accumulation or share // micro
    if micro * accumulation * world != total:
        raise UserError(
            f"{micro} sequences at a time x {accumulation} accumulation steps x {world} processes is "
            f"{micro * accumulation * world}, but the batch is {total}: write "
            f'"train_batch_size": {micro * accumulation * world}, or "auto" for one of the three'
        )
    return Batch(total=total, micro=micro, accumulation=accumulation)


def _resolve_precision(config: dict[str, Any], request: Request, notes: list[str]) -> bool:
    fp16 = bool(_section(config, "fp16").get("enabled", False))
    bf16 = _section(config, "bf16").get("enabled", False)
    if bf16 == AUTO:
        bf16 = request.bf16_is_fast and not fp16
        config["bf16"] = {**config["bf16"], "enabled": bf16}
        if not fp16:
            notes.append("precision: bf16" if bf16 else "precision: fp32 (bf16 is slow or missing on this device)")
    elif bf16 and not request.bf16_is_fast:
        notes.append("precision: bf16, as the JSON says; it is slow on this device")
    autocast = _section(config, "torch_autocast")
    if autocast.get("enabled"):
        notes.append(
            f"torch_autocast: matrices are multiplied in {autocast.get('dtype', 'the dtype that torch chooses')}"
        )
    return bool(bf16)


def _resolve_schedule(config: dict[str, Any], request: Request) -> int:
    scheduler = _section(config, "scheduler")
    params = dict(scheduler.get("params") or {})
    written = params.get("total_num_steps")
    if isinstance(written, int) and request.steps is not None and request.steps != written:
        raise UserError(
            f"--steps is {request.steps}, but the JSON says scheduler.params.total_num_steps = {written}: "
            'write "auto" there, or leave the flag out'
        )
    steps = request.steps or (written if isinstance(written, int) else request.default_steps)
    if written == AUTO:
        params["total_num_steps"] = steps
    if params.get("warmup_num_steps") == AUTO:
        params["warmup_num_steps"] = max(1, round(WARMUP_SHARE * steps))
    if params.get("warmup_min_ratio") == AUTO and isinstance(params.get("warmup_num_steps"), int):
        params["warmup_min_ratio"] = 1 / params["warmup_num_steps"]  # the first update's share: no update is idle
    if scheduler:
        config["scheduler"] = {**scheduler, "params": params}
    return steps


def _resolve_rank(config: dict[str, Any], request: Request, notes: list[str]) -> None:
    section = _section(config, "megalr")
    parametrization = section.get("parametrization")
    if isinstance(parametrization, Mapping) and parametrization.get("rank") == AUTO:
        section["parametrization"] = {**parametrization, "rank": request.default_rank}
        config["megalr"] = section
        notes.append(f"rank: {request.default_rank}, a quarter of the model's width")
    optimizer = _section(config, "optimizer")
    params = dict(optimizer.get("params") or {})
    if params.get("rank") == AUTO:
        params["rank"] = request.default_rank
        config["optimizer"] = {**optimizer, "params": params}
        notes.append(f"rank: {request.default_rank}, a quarter of the model's width")


def _resolve_seed(config: dict[str, Any], request: Request) -> int:
    section = _section(config, "megalr")
    written = section.get("seed", AUTO)
    if written == AUTO:
        seed = request.seed or 0
        config["megalr"] = {**section, "seed": seed}
        return seed
    if request.seed is not None and request.seed != written:
        raise UserError(f"--seed is {request.seed}, but the JSON says megalr.seed = {written}: leave one of them out")
    return written if isinstance(written, int) else 0  # what it should be is megalr.config.settings's to say


def _resolve_plugins(config: dict[str, Any]) -> None:
    """Paths made absolute, so that the run can go on from another folder."""
    section = config.get("megalr")
    if isinstance(section, dict) and isinstance(section.get("plugins"), list):
        section["plugins"] = [absolute_plugin(n) if isinstance(n, str) else n for n in section["plugins"]]


def _resolve_monitors(config: dict[str, Any], request: Request) -> None:
    for name in ("tensorboard", "csv_monitor"):
        section = _section(config, name)
        if section.get("output_path") == AUTO:
            section = {**section, "output_path": request.output}
        if section.get("job_name") == AUTO:
            section = {**section, "job_name": name}
        if section:
            config[name] = section


def _number(config: Mapping[str, Any], key: str, flag: str | None, asked: int | None) -> int | None:
    """What the JSON says, what the flag says, or None where neither says."""
    written = config.get(key, AUTO)
    if written == AUTO:
        return asked
    if not isinstance(written, int) or isinstance(written, bool) or written < 1:
        raise UserError(f'{key} is {written!r}: write a whole number of at least 1, or "auto"')
    if asked is not None and asked != written:
        raise UserError(
            f'{flag} is {asked}, but the JSON says {key} = {written}: write "auto" there, or leave the flag out'
        )
    return written


def _largest_divisor(number: int, limit: int) -> int:
    return next(divisor for divisor in range(min(number, limit), 0, -1) if number % divisor == 0)


def _section(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = config.get(name) or {}
    if not isinstance(section, Mapping):
        raise UserError(f'"{name}" must be an object, not {section!r}')
    return dict(section)


def _refuse_auto(config: Mapping[str, Any], where: str = "") -> None:
    for key, value in config.items():
        if isinstance(value, Mapping):
            _refuse_auto(value, f"{where}{key}.")
        elif value == AUTO:
            raise UserError(
                f'{where}{key} is "auto", which nothing here resolves: write a value, or leave the line out'
            )
