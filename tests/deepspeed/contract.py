"""What the ranks run in the contract test: engines of every class that megalr.hosts knows, asked what it asks them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from deepspeed.pipe import PipelineModule
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import megalr
from megalr import hosts
from megalr.hosts import deepspeed, deepspeed_gradients, tensor_parallel, zero_layouts
from megalr.hosts.base import RunningHost
from tests.deepspeed import pipelining
from tests.deepspeed.tensor_training import dense_model, projected, tensor_configuration, tensor_parallel_groups
from tests.structure import tables

LEARNING_RATE, ACCUMULATION = 1e-3, 2
WIDTH = 6

# A "zero_optimization" section, and the rest of the JSON. Without a dtype it is fp32.
ENGINES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "stage 0": ({"stage": 0}, {}),
    "stage 1": ({"stage": 1}, {}),
    "stage 2": ({"stage": 2}, {}),
    "stage 3": ({"stage": 3, "stage3_param_persistence_threshold": 0}, {}),
    "stage 3, hpZ": ({"stage": 3, "stage3_param_persistence_threshold": 0, "zero_hpz_partition_size": 2}, {}),
    "stage 2, on the CPU": ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, {}),
    "stage 3, on the CPU": (
        {"stage": 3, "stage3_param_persistence_threshold": 0, "offload_optimizer": {"device": "cpu"}},
        {},
    ),
    "stage 0, bf16": ({"stage": 0}, {"bf16": {"enabled": True}}),
    "stage 1, bf16": ({"stage": 1}, {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}),
    "stage 2, bf16": ({"stage": 2}, {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}),
}


class Answer(NamedTuple):
    """What one rank has found.

    Attributes:
        missing: a line for each attribute that hosts/ reads and that is not there.
        met: whose attributes were looked at.
        facts: what the engine answers through its host, by question.
    """

    missing: list[str]
    met: set[str]
    facts: dict[str, Any]


class Net(nn.Module):
    """Three layers, the middle one frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.frozen, self.last = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """(n, WIDTH) to the same."""
        y: Tensor = self.last(self.frozen(self.first(x)))
        return y


def missing(kind: str, thing: Any) -> list[str]:
    """What hosts/ reads of a thing, and the thing does not have.

    Args:
        kind: the key of hosts/' tables.
        thing: an object; of a dictionary the keys are looked at.
    """
    lines = []
    for file, table in tables().items():
        for name in table.get(kind, ()):
            if not (name in thing if isinstance(thing, dict) else hasattr(thing, name)):
                lines.append(
                    f"{kind} has no {name} ({type(thing).__module__}.{type(thing).__qualname__}), "
                    f"which megalr/hosts/{file} reads"
                )
    return lines


def zero(name: str, folder: str) -> Answer:
    """An engine of :data:`ENGINES`."""
    section, rest = ENGINES[name]
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": 1.0,
        "steps_per_print": 10**9,
        "zero_optimization": section,
        "optimizer": {"type": "AdamW", "params": {"lr": LEARNING_RATE}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": 1e-4, "warmup_num_steps": 10}},
        "csv_monitor": {"enabled": True, "output_path": folder, "job_name": "contract"},
        **copy.deepcopy(rest),
    }
    torch.manual_seed(0)
    engine = megalr.initialize(model=Net(), config=config)[0]
    host = hosts.host_of(engine)
    x = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(dist.get_rank())).to(host.dtypes[0])
    answer = _answer(engine)
    facts = answer.facts
    before = (host.progress(), host.ends_update())
    answer.missing.extend(_micro_batch(engine, x))
    between = (host.progress(), host.ends_update())
    _micro_batch(engine, x)
    facts |= {"before": before, "between": between, "after": (host.progress(), host.ends_update())}
    facts |= {"counters": host.counters(), "gradient norm": host.gradient_norm(), "loss scale": host.loss_scale()}
    host.report({"Contract/number": 7.0})
    facts["report"] = [path.read_text() for path in Path(folder).rglob("*number*.csv")]
    if engine.monitor.csv_monitor is not None:  # on the first rank
        engine.monitor.csv_monitor.log_dir = f"{folder}/gone"
    host.report({"Contract/number": 8.0})  # by a monitor that cannot write
    facts["held"] = _held_in_all(host)
    facts["written"] = _writes_frozen_weights(engine, x)
    facts["loaded"] = _loads_frozen_weights(engine, x, folder)
    facts["published"] = _publishes(engine)
    facts["files"] = _unknown_files(engine, folder)
    host.set_counters({"global_steps": 5, "global_samples": 3, "skipped_steps": 1})
    facts["set counters"] = (host.counters(), host.progress())
    engine.destroy()
    return answer


def autotp(folder: str) -> Answer:
    """Two ranks that share each layer; one kind of layer is projected, the others are dense."""
    with tensor_parallel_groups():
        section = {"parametrization": {**projected("input"), "target_modules": ["q_proj"]}}
        config = tensor_configuration(2, 1, "AdamW", megalr=section)
        engine = megalr.initialize(model=dense_model(), config=config)[0]
        answer = _answer(engine)
        model: LlamaForCausalLM = engine.module
        layer = model.model.layers[0].self_attn
        answer.facts["classes"] = (type(layer.q_proj).__name__, type(layer.k_proj).__name__)
        answer.facts["cuts"] = {
            name: tensor_parallel.tensor_parallel_cuts({name: getattr(layer, name).weight}).get(name)
            for name in ("q_proj", "k_proj", "o_proj")
        }
        answer.met.add(tensor_parallel.REPLACED)
        answer.missing.extend(missing(tensor_parallel.REPLACED, layer.q_proj))
        engine.destroy()
    return answer


def pipeline(folder: str) -> Answer:
    """Two pipeline stages of one rank each."""
    with tensor_parallel_groups():
        model = PipelineModule(pipelining.LAYERS, num_stages=2, loss_fn=pipelining.loss_of)
        config = {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": ACCUMULATION,
            "steps_per_print": 10**9,
            "optimizer": {"type": "AdamW", "params": {"lr": LEARNING_RATE}},
        }
        engine = megalr.initialize(model=model, config=config)[0]
        answer = _answer(engine)
        ids = torch.arange(16).view(2, 8)
        engine.train_batch(iter([(ids, ids)] * ACCUMULATION))
        answer.facts["counters"] = hosts.host_of(engine).counters()
        answer.facts["ends update"] = hosts.host_of(engine).ends_update()
        answer.facts["files"] = _unknown_files(engine, folder)
        engine.destroy()
    return answer


def _answer(engine: Any) -> Answer:
    """Looks at everything that can be reached from an engine, and asks its host what needs no training."""
    host = hosts.host_of(engine)
    lines, met = [], set()
    for kind, thing in _things(engine):
        met.add(kind)
        lines += missing(kind, thing)
    groups = host.groups()
    facts = {
        "class": type(host).__name__,
        "stage": host.stage,
        "dtypes": host.dtypes,
        "groups": (groups.data_size, groups.tensor_size),
        "threshold": host.persistence_threshold,
        "rate": host.learning_rate(),
        "trained": sum(_numel(p) for group in host.parameter_groups() for p in group),
        "in model": sum(_numel(p) for p in host.module.parameters() if p.requires_grad),
        "optimizer": type(host.optimizer).__name__,
        "masters": host.tensors().masters is not None,
    }
    return Answer(lines, met, facts)


def _things(engine: Any) -> Iterator[tuple[str, Any]]:
    """What hosts/ may meet, with the keys of its tables; a thing may have several."""
    declared = {kind for table in tables().values() for kind in table}
    things = [engine, engine.optimizer, engine.module, engine.monitor, getattr(engine.optimizer, "loss_scaler", None)]
    things += [getattr(engine.optimizer, name, None) for name in ("loss_scale_config", "parameter_offload")]
    for thing in things:
        for cls in type(thing).__mro__:
            name = f"{cls.__module__}.{cls.__qualname__}"
            if name in declared:
                yield name, thing
    yield "the configuration of an engine", engine._config
    if getattr(engine.optimizer, "offload_optimizer", False):
        yield deepspeed_gradients.STAGE_3_ON_CPU, engine.optimizer
    if getattr(engine.optimizer, "cpu_offload", False):
        yield deepspeed_gradients.STAGE_2_ON_CPU, engine.optimizer
    if engine.lr_scheduler is not None:
        yield "a schedule of DeepSpeed's", engine.lr_scheduler
    for parameter in engine.module.parameters():
        yield from _marks(engine, parameter)
    for module in engine.module.modules():
        if type(module).__name__ in ("LinearLayer", "LinearAllreduce"):
            yield tensor_parallel.CUT, module.weight
            mark = getattr(module.weight, tensor_parallel.AUTOTP)
            yield tensor_parallel.MARK, mark
            yield tensor_parallel.CONVERSION, mark["conversion"]
    mpu = zero_layouts.told_of_parallelism()
    if mpu is not None:
        yield "the mpu that DeepSpeed was given", mpu
    if callable(getattr(engine.module, "topology", None)):
        yield "the topology of a PipelineModule", engine.module.topology()
        yield "the mpu of a PipelineModule", engine.module.mpu()
        yield "a parameter of a PipelineModule", next(engine.module.parameters())


def _marks(engine: Any, parameter: Tensor) -> Iterator[tuple[str, Any]]:
    if hasattr(parameter, "ds_id"):
        yield zero_layouts.CUT, parameter
    record = getattr(parameter, "_hp_mapping", None)
    if hasattr(parameter, "_hp_mapping"):
        yield zero_layouts.FLAT, parameter
        if type(engine.optimizer).__name__ == "DeepSpeedZeroOptimizer":
            yield deepspeed.ACCUMULATING, parameter
    if record is not None:
        yield zero_layouts.RECORD, record


def _micro_batch(engine: Any, x: Tensor) -> list[str]:
    """One backward pass and a step; what is missing while gradients are there."""
    engine.backward(engine(x).float().square().mean())
    lines = [line for kind, thing in _things(engine) for line in missing(kind, thing)]
    engine.step()
    return lines


def _held_in_all(host: RunningHost) -> dict[str, tuple[int, int]]:
    """Elements of each parameter that ranks hold as their own part, added up, and how many it has."""
    found = {}
    for name, parameter in host.module.named_parameters():
        own = torch.tensor(hosts.held(parameter)[0][1].numel())
        if hosts.is_partitioned(parameter):
            dist.all_reduce(own)
        found[name] = (int(own), _numel(parameter))
    return found


@torch.no_grad()
def _writes_frozen_weights(engine: Any, x: Tensor) -> tuple[bool, bool]:
    """Whether rows of the output differ before, and are the same once the frozen layer gives a constant."""
    before = engine(x)
    frozen = engine.module.frozen
    hosts.write(frozen.weight, torch.zeros(WIDTH, WIDTH))
    hosts.write(frozen.bias, torch.arange(float(WIDTH)))
    after = engine(x)
    with hosts.gather([engine.module.last.weight, engine.module.last.bias]):
        expected = engine.module.last(torch.arange(float(WIDTH)).to(x))
    return torch.equal(before[0], before[1]), bool(
        torch.allclose(after, expected.expand_as(after), rtol=2e-2, atol=2e-2)
    )


@torch.no_grad()
def _loads_frozen_weights(engine: Any, x: Tensor, folder: str) -> tuple[bool, bool]:
    """Whether the model computes as it did when it was saved, after a frozen weight was changed, and after the load."""
    megalr.save_checkpoint(engine, Path(folder, "saved"))
    before = engine(x)
    hosts.write(engine.module.frozen.bias, torch.ones(WIDTH))
    after = engine(x)
    megalr.load_checkpoint(engine, Path(folder, "saved"))
    return torch.equal(before, after), torch.equal(before, engine(x))


@torch.no_grad()
def _unknown_files(engine: Any, folder: str) -> tuple[int, list[str]]:
    """How many files a checkpoint of DeepSpeed's own has, and those that megalr would not take for such."""
    engine.save_checkpoint(folder, tag="own")
    dist.barrier()
    names = [path.name for path in Path(folder, "own").rglob("*.pt")]
    return len(names), [name for name in names if not any(fnmatch(name, one) for one in deepspeed.CHECKPOINT_FILES)]


def _publishes(engine: Any) -> bool:
    """Whether the model computes with what was written into the masters."""
    host = hosts.host_of(engine)
    shard = host.optimizer.prepare()
    host.prepare_load()
    for buffer in shard.buffers:
        buffer.fill_(0.5)
    host.publish(shard)
    weights = [p for group in host.parameter_groups() for p in group]
    with hosts.gather(weights):
        return all(bool((weight == 0.5).all()) and weight.numel() for weight in weights)


def _numel(parameter: Tensor) -> int:
    return torch.Size(hosts.logical_shape(parameter)).numel()
