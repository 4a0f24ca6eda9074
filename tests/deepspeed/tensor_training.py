"""What the ranks run in the tests of tensor parallelism: a LLaMA cut by DeepSpeed's AutoTP, with ZeRO over the rest."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime import engine as deepspeed_engine
from deepspeed.utils import groups, safe_get_full_grad
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

import megalr
from megalr.hosts.tensor_parallel import indices_in_whole, tensor_parallel_cuts
from megalr.layers.tensor_parallel import messages as sending
from megalr.layers.tensor_parallel.cutting import cut_layers
from tests.deepspeed import rule_training
from tests.deepspeed.rule_training import SEQUENCES
from tests.deepspeed.training import MEGALR, VOCABULARY, configuration, finish, lost_by_resuming, run_steps, same

MODEL = {
    "hidden_size": 24,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
}

# Gradients of a fresh small model are so even that rounding decides on their singular vectors.
SPREAD = 0.2
LOW_RANK = {**MEGALR, "exchange_bucket_bytes": 20_000}
FACTOR_STEPS = 20


def dense_model(spread: float = 0.02) -> LlamaForCausalLM:
    """The same in every process; with so much standard deviation of its weights."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**MODEL, initializer_range=spread))


def settings(optimizer: str) -> dict[str, Any]:
    """Of a rule, on all linear layers but the head; with another name where the odd model's is used."""
    params = rule_training.RULES[optimizer]
    named = {"target_modules": ["_proj"], "blocks": ["layers.0.", "q_proj", "mlp"]}
    return {key: named.get(key, value) for key, value in params.items()}


def tensor_configuration(
    tensor: int, stage: int, optimizer: str, accumulation: int = 1, **changes: Any
) -> dict[str, Any]:
    """A DeepSpeed JSON of one rule, with so many tensor-parallel ranks."""
    data = dist.get_world_size() // tensor
    config = configuration(stage, accumulation, **changes)
    config["train_batch_size"] = SEQUENCES
    config["train_micro_batch_size_per_gpu"] = SEQUENCES // data // accumulation
    config["optimizer"] = {"type": optimizer, "params": settings(optimizer)}
    config["megalr"] = {"exchange_bucket_bytes": 20_000, **changes.get("megalr", {})}
    config["tensor_parallel"] = {"autotp_size": tensor}
    return config


def train(
    tensor: int, stage: int, optimizer: str, steps: int = rule_training.STEPS, **changes: Any
) -> tuple[dict[str, Tensor] | None, dict[str, int]]:
    """Train from the start; rank 0 returns the fp32 masters, whole, and every rank its counts."""
    with tensor_parallel_groups():
        config = tensor_configuration(tensor, stage, optimizer, **changes)
        engine = megalr.initialize(model=dense_model(SPREAD), config=config)[0]
        run_steps(engine, rule_training.batches(steps))
        weights = megalr.consolidated_state_dict(engine)
        base = engine.basic_optimizer
        counts = {"calls": base.rule_calls, "updates": base.updates, "bytes": base.bytes_moved}
        engine.destroy()
    return weights, counts


SLTRAIN = {**LOW_RANK, "parametrization": {"type": "sltrain", "rank": 5, "density": 0.1, "init": "variance_matched"}}


def variant_engine(
    tensor: int,
    stage: int,
    kind: str,
    model: dict[str, Any] | None = None,
    section: dict[str, Any] | None = None,
    frozen: tuple[str, ...] = (),
    **changes: Any,
) -> tuple[Any, dict[str, Any]]:
    """A fresh engine and its JSON.

    Args:
        tensor, stage: as everywhere.
        kind: a key of :data:`SECTIONS`; dense weights are trained by GaLore.
        model: what is another in the model's configuration; its biases and norms are drawn.
        section: added to "tensor_parallel".
        frozen: parts of names of parameters that are not trained.
        **changes: as of :func:`tensor_configuration`.
    """
    optimizer = "GaLoreAdamW" if kind == "full" else "AdamW"
    config = tensor_configuration(tensor, stage, optimizer, megalr=SECTIONS[kind], **changes)
    config["tensor_parallel"].update(section or {})
    torch.manual_seed(0)
    spread = SPREAD if kind == "full" or "projected" in kind else 0.02
    variant = LlamaForCausalLM(LlamaConfig(**{**MODEL, "initializer_range": spread, **(model or {})}))
    for name, parameter in variant.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
        if any(part in name for part in frozen):
            parameter.requires_grad_(False)
    return megalr.initialize(model=variant, config=config)[0], config


def train_variant(*args: Any, **kwargs: Any) -> dict[str, Tensor] | None:
    """Twelve updates of a :func:`variant_engine`."""
    with tensor_parallel_groups():
        engine, config = variant_engine(*args, **kwargs)
        run_steps(engine, rule_training.batches(rule_training.STEPS))
        return finish(engine, config)


def norms(*args: Any, **kwargs: Any) -> list[float]:
    """The norms that DeepSpeed clips by in three updates of a :func:`variant_engine`."""
    found: list[float] = []
    clip = deepspeed_engine.clip_grad_norm_

    def note(*args: Any, **kwargs: Any) -> Tensor:  # stage 0 in fp32 tells nobody
        norm: Tensor = clip(*args, **kwargs)
        found.append(float(norm))
        return norm

    with tensor_parallel_groups():
        engine, _ = variant_engine(*args, **kwargs)
        deepspeed_engine.clip_grad_norm_ = note
        try:
            for ids in rule_training.batches(3):
                run_steps(engine, [ids])
                norm = engine.get_global_grad_norm()
                found += [] if norm is None else [float(norm)]
        finally:
            deepspeed_engine.clip_grad_norm_ = clip
        engine.destroy()
    return found


def copies_apart(*args: Any, **kwargs: Any) -> list[str]:
    """Parameters of which tensor-parallel ranks should have the same and have not, bit for bit, after training."""
    with tensor_parallel_groups():
        engine, _ = variant_engine(*args, **kwargs)
        run_steps(engine, rule_training.batches(rule_training.STEPS))
        copies = {n: p for n, p in engine.module.named_parameters() if not tensor_parallel_cuts({n: p})}
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, {name: parameter.detach().clone() for name, parameter in copies.items()})
        engine.destroy()
    return [name for name in copies if any(not torch.equal(each[name], found[0][name]) for each in found)]


class Attention(torch.nn.Module):
    """Layers with the names of those that get one input, which get two."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (torch.nn.Linear(8, 6) for _ in range(3))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Whatever depends on which of them each layer got."""
        return self.q_proj(x) * self.k_proj(y) + self.v_proj(x)


def siblings(kind: str) -> list[float]:
    """Relative errors of two passes' outputs and gradients, on each rank, where siblings get different inputs."""
    torch.manual_seed(0)
    whole = torch.nn.ModuleDict({"attn": Attention()})
    content = {"megalr": {"parametrization": {**SECTIONS[kind]["parametrization"], "target_modules": ["attn"]}}}
    megalr.parametrize(whole, content, other_optimizer=True)
    for name, parameter in whole.named_parameters():
        if name.endswith("R"):  # which starts at zero
            torch.nn.init.normal_(parameter)
    cut, group = copy.deepcopy(whole), dist.group.WORLD
    config = megalr.MegalrConfig.from_json(content).parametrization
    cut_layers(cut, config, {f"attn.{name}_proj": "rows" for name in "qkv"}, group)
    x, y = (torch.randn(5, 8, requires_grad=True) for _ in range(2))
    rank, width = dist.get_rank(), 6 // dist.get_world_size()
    errors = []
    for _ in range(2):
        expected, got = whole.attn(x, y), cut.attn(x, y)
        errors.append(_error(got, expected[:, rank * width : (rank + 1) * width]))
        pairs = zip(torch.autograd.grad(got.sum(), (x, y)), torch.autograd.grad(expected.sum(), (x, y)), strict=True)
        errors += [_error(*pair) for pair in pairs]
    return errors


def _error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


# Name: the "parametrization" section of projected layers, every way of cutting them among them.
PROJECTED = {
    "input": {},
    "power": {"projector": "power"},
    "output": {"side": "output", "projector": "svd", "moments": "transport"},
    "std": {"side": "std", "stagger": False, "moments": "reset"},
    "random": {"projector": "random"},
}


def projected(case: str) -> dict[str, Any]:
    """The JSON's "parametrization" section."""
    section = {"type": "projected", "rank": 5, "update_proj_gap": 5, "target_modules": ["attn", "mlp"]}
    return section | PROJECTED[case]


# Name: the "megalr" section of what a first step is compared of.
SECTIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "low_rank": LOW_RANK,
    "sltrain": SLTRAIN,
    "projected, input": {"parametrization": projected("input")},
    "projected, output": {"parametrization": projected("output")},
}
HEAD = ["attn", "mlp", "lm_head"]
SECTIONS |= {
    f"{kind}, head": {"parametrization": {**SECTIONS[kind]["parametrization"], "target_modules": HEAD}}
    for kind in list(SECTIONS)
    if kind != "full"
}


def train_projected(tensor: int, stage: int, case: str) -> dict[str, Tensor] | None:
    """:func:`train` of projected layers; rank 0 returns a dense model's weights."""
    with tensor_parallel_groups():
        config = tensor_configuration(tensor, stage, "AdamW", megalr={"parametrization": projected(case)})
        engine = megalr.initialize(model=dense_model(SPREAD), config=config)[0]
        run_steps(engine, rule_training.batches(rule_training.STEPS))
        return finish(engine, config)


def train_factors(tensor: int, stage: int, section: dict[str, Any] = LOW_RANK) -> dict[str, Tensor] | None:
    """Train low-rank factors with refactorizations and momentum resets; rank 0 returns a dense model's weights."""
    with tensor_parallel_groups():
        config = tensor_configuration(tensor, stage, "AdamW", megalr=section)
        engine = megalr.initialize(model=dense_model(), config=config)[0]
        run_steps(engine, rule_training.batches(FACTOR_STEPS))
        return finish(engine, config)


@contextmanager
def tensor_parallel_groups() -> Iterator[None]:
    """DeepSpeed makes its tensor-parallel groups once a process; end them, for engines of another size.

    Groups that are only forgotten keep threads that look for messages, and hundreds of these slow all tests down.
    """
    try:
        yield
    finally:
        for group in {groups._TENSOR_MODEL_PARALLEL_GROUP, groups._MODEL_PARALLEL_GROUP, groups._DATA_PARALLEL_GROUP}:
            if group not in (None, dist.group.WORLD):
                dist.destroy_process_group(group)
        groups.mpu = None
        groups._TENSOR_MODEL_PARALLEL_GROUP = groups._MODEL_PARALLEL_GROUP = groups._DATA_PARALLEL_GROUP = None
        groups.mesh_device = None


def first_step(tensor: int, stage: int, kind: str, **variant: Any) -> dict[str, Tensor] | None:
    """Logits, loss and every gradient of one sequence batch before any update; whole, on rank 0."""
    with tensor_parallel_groups():
        engine, _ = variant_engine(tensor, stage, kind, gradient_clipping=0.0, **variant)
        ids = rule_training.batches(1)[0]
        output = engine(input_ids=ids, labels=ids)
        engine.backward(output.loss)
        found = {"logits": output.logits.detach().clone(), "loss": output.loss.detach().clone()[None]}
        for name, parameter in engine.module.named_parameters():
            if not parameter.requires_grad:
                continue
            grad = safe_get_full_grad(parameter) if stage else parameter.grad
            parts: list[Any] = [grad.clone()]
            cut = tensor_parallel_cuts({name: parameter})
            if cut:
                parts = [None] * tensor
                dist.all_gather_object(parts, grad.clone(), group=groups.get_tensor_model_parallel_group())
            found[name] = torch.cat(parts, dim=cut.get(name, 0))
            places = indices_in_whole(parameter)
            if places is not None:
                found[name] = torch.empty_like(found[name]).index_copy_(0, places, found[name])
        engine.destroy()
    return found if dist.get_rank() == 0 else None


def messages(stage: int) -> list[tuple[int, int]]:
    """Of each message that low-rank layers send in a forward and a backward pass: its width, and its elements."""
    with tensor_parallel_groups():
        config = tensor_configuration(2, stage, "AdamW", megalr=LOW_RANK)
        engine = megalr.initialize(model=dense_model(), config=config)[0]
        sent: list[tuple[int, int]] = []
        summed = sending._summed

        def count(x: Tensor, group: dist.ProcessGroup) -> Tensor:
            sent.append((x.shape[-1], x.numel()))
            return summed(x, group)

        sending._summed = count
        try:
            run_steps(engine, rule_training.batches(1))
        finally:
            sending._summed = summed
        engine.destroy()
    return sent


def poison(stage: int, optimizer: str, where: str, only_rank: int | None) -> tuple[list[str], list[str], int]:
    """:func:`tests.deepspeed.rule_training.poison` with two tensor-parallel ranks."""
    with tensor_parallel_groups():
        engine = megalr.initialize(model=dense_model(SPREAD), config=tensor_configuration(2, stage, optimizer))[0]
        return rule_training.poison_engine(engine, where, only_rank)


def resume(tensor: int, stage: int, folder: str, optimizer: str | None = None) -> list[str]:
    """Seven updates, a checkpoint, five more; the last five again from the checkpoint. Names of what differs."""
    section = {} if optimizer else LOW_RANK
    config = tensor_configuration(tensor, stage, optimizer or "AdamW", megalr=section)
    with tensor_parallel_groups():
        return lost_by_resuming(
            lambda: megalr.initialize(model=dense_model(), config=config)[0],
            rule_training.batches(rule_training.STEPS),
            7,
            folder,
            rule_training.everything,
        )


def resume_at_once(stage: int, case: str, folder: str) -> list[str]:
    """A checkpoint of three updates, loaded into a new engine before its first pass. Names of what differs then."""
    config = tensor_configuration(2, stage, "AdamW", megalr={"parametrization": projected(case)})
    data = rule_training.batches(5)
    with tensor_parallel_groups():
        engine = megalr.initialize(model=dense_model(SPREAD), config=config)[0]
        assert megalr.consolidated_state_dict(engine) is not None or dist.get_rank()
        megalr.save_checkpoint(engine, folder, tag="before")
        run_steps(engine, data[:3])
        megalr.save_checkpoint(engine, folder)
        run_steps(engine, data[3:])
        expected = rule_training.everything(engine)
        engine.destroy()
        engine = megalr.initialize(model=dense_model(SPREAD), config=config)[0]
        megalr.load_checkpoint(engine, folder)
        run_steps(engine, data[3:])
        found = rule_training.everything(engine)
        engine.destroy()
    return [key for key, held in expected.items() if not same(held, found[key])]


def refused(
    tensor: int,
    model: dict[str, Any] | None = None,
    *,
    section: dict[str, Any] | None = None,
    units: dict[str, int] | None = None,
    second_way: bool = False,
    fused: bool = False,
    **megalr_section: Any,
) -> str:
    """The message of a job that cannot work; empty where it starts.

    Args:
        tensor, model: as elsewhere.
        section: added to "tensor_parallel".
        units: of :class:`Units`, which is passed as ``mpu``.
        second_way: by ``megalr.build_optimizer``.
        fused: the model is a Phi-3.
        **megalr_section: of the JSON.
    """
    config = tensor_configuration(tensor, 1, "AdamW", megalr=megalr_section)
    config["tensor_parallel"].update(section or {})
    del config["train_micro_batch_size_per_gpu"]  # DeepSpeed knows how many ranks have data of their own
    sizes = MODEL | (model or {})
    dense = Phi3ForCausalLM(Phi3Config(**sizes, pad_token_id=0)) if fused else LlamaForCausalLM(LlamaConfig(**sizes))
    with tensor_parallel_groups():
        try:
            if second_way:
                megalr.build_optimizer(megalr.parametrize(dense, config), config)
            else:
                mpu = None if units is None else Units(**units)
                megalr.initialize(model=dense, config=config, mpu=mpu)
        except megalr.UserError as error:
            return str(error)
    return ""


class Units:
    """What Megatron-LM's ``mpu`` tells DeepSpeed, of two tensor-parallel ranks and the rest data-parallel.

    With several stages each has such ranks of its own.
    """

    def __init__(self, stages: int = 1) -> None:
        world = dist.get_world_size()
        size = world // stages
        tensor = [dist.new_group([i, i + 1]) for i in range(0, world, 2)]
        firsts = [first + i for first in range(0, world, size) for i in range(2)]
        data = [dist.new_group(list(range(i, i + size - i % 2, 2))) for i in firsts]
        rank = dist.get_rank()
        self._tensor, self._data = tensor[rank // 2], data[rank // size * 2 + rank % 2]

    def get_model_parallel_rank(self) -> int:
        return dist.get_rank(self._tensor)

    def get_model_parallel_world_size(self) -> int:
        return dist.get_world_size(self._tensor)

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._tensor

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self._data)

    def get_data_parallel_world_size(self) -> int:
        return dist.get_world_size(self._data)

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._data


def train_with_units(stage: int) -> dict[str, Tensor] | None:
    """:func:`train_factors` with groups of the user's own."""
    with tensor_parallel_groups():
        config = tensor_configuration(2, stage, "AdamW", megalr=LOW_RANK)
        del config["tensor_parallel"]
        engine = megalr.initialize(model=dense_model(), config=config, mpu=Units())[0]
        run_steps(engine, rule_training.batches(FACTOR_STEPS), tensor=2)
        return finish(engine, config)
