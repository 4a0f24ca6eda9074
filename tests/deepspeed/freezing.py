"""What the ranks run in the tests of factors that a job freezes, and of parameters that DeepSpeed does not take."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

import megalr
from tests.equality import CLIPPING, SEQUENCES, batches
from tests.odd_model import HIDDEN, VOCABULARY, layered_model

UPDATES, SAVED = 9, 6  # with refactorizations after 4 and 8, and a checkpoint between them
RANK = {"rank": 5, "target_modules": ["attn", "mlp"]}
REFACTORIZED = {"refactorization": {"interval": 4, "moments": "transport"}}
METHODS: dict[str, dict[str, Any]] = {
    "low_rank": {"parametrization": {"type": "low_rank", **RANK}, **REFACTORIZED},
    "sltrain": {"parametrization": {"type": "sltrain", **RANK, "density": 0.1}, **REFACTORIZED},
    "lora": {"parametrization": {"type": "lora", **RANK}, **REFACTORIZED},
    "relora": {"parametrization": {"type": "relora", **RANK, "merge_every": 4, "restart_warmup_steps": 2}},
    "switchlora": {"parametrization": {"type": "switchlora", **RANK, "switch_interval": 6, "frozen_steps": 1}},
    "loro": {"parametrization": {"type": "loro", **RANK, "exact_every": 4, "restart_warmup_steps": 2}},
    "projected": {"parametrization": {"type": "projected", **RANK, "update_proj_gap": 4}},
}


class Distilled(nn.Module):
    """A student, and the frozen copy of it that it learns from."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student, self.teacher = student, copy.deepcopy(student).requires_grad_(False)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        found = self.student(input_ids=input_ids, labels=labels)
        with torch.no_grad():
            target = self.teacher(input_ids=input_ids, labels=labels).logits
        found.loss = found.loss + (found.logits - 2 * target).square().mean()
        return found


def frozen_model(method: str, what: str) -> nn.Module:
    """A model with replaced layers of which a job has frozen some.

    Args:
        method: of :data:`METHODS`.
        what: "block", one layer of two; "factor", one of the factors of one matrix; "teacher", all of a copy.
    """
    model = megalr.parametrize(layered_model(), {"megalr": METHODS[method]})
    if what == "teacher":
        return Distilled(model)
    start = {"block": "layers.0.", "factor": "layers.0.mlp_tall.A"}[what]
    for name, parameter in model.named_parameters():
        if name.startswith(start):
            parameter.requires_grad_(False)
    return model


def still(method: str, what: str) -> dict[str, Tensor]:
    """The values of all that :func:`frozen_model` has frozen, which training does not change."""
    model = frozen_model(method, what)
    # Of a layer that is trained, events change W0 and bases.
    start = {"block": "layers.0.", "factor": "layers.0.mlp_tall.A", "teacher": "teacher."}[what]
    return {name: p.detach() for name, p in model.named_parameters() if name.startswith(start)}


def configuration(method: str, stage: int) -> dict[str, Any]:
    """A DeepSpeed JSON."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    params = {"lr": 3e-3, "eps": 1e-6, "weight_decay": 0.1}  # an epsilon that rounding does not reach
    return {
        "train_batch_size": SEQUENCES,
        "train_micro_batch_size_per_gpu": SEQUENCES // ranks,
        "gradient_clipping": CLIPPING,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 3000, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "megalr": {**METHODS[method], "optimizer": {"type": "AdamW", "params": params}},
    }


def plain(method: str, what: str) -> dict[str, Tensor]:
    """The weights that one process gives, without an engine."""
    model = frozen_model(method, what)
    optimizer = megalr.build_optimizer(model, configuration(method, 0))
    for ids in batches(UPDATES):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], CLIPPING)
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


def train(method: str, what: str, stage: int, folder: str) -> tuple[dict[str, Tensor] | None, list[str]]:
    """Train, and once more the last updates, from a checkpoint.

    Returns:
        On rank 0 the weights; and the names of those that differ in a bit after the checkpoint.
    """
    data = batches(UPDATES)
    engine = _engine(method, what, stage)
    _run(engine, data[:SAVED])
    megalr.save_checkpoint(engine, Path(folder))
    _run(engine, data[SAVED:])
    found = megalr.consolidated_state_dict(engine)
    engine.destroy()
    engine = _engine(method, what, stage)
    megalr.load_checkpoint(engine, Path(folder))
    _run(engine, data[SAVED:])
    again = megalr.consolidated_state_dict(engine)
    engine.destroy()
    if found is None or again is None:
        return None, []
    return found, [name for name, weight in found.items() if not torch.equal(weight, again[name])]


def _engine(method: str, what: str, stage: int) -> Any:
    config, model = configuration(method, stage), frozen_model(method, what)
    return deepspeed.initialize(model=model, optimizer=megalr.build_optimizer(model, config), config=config)[0]


def _run(engine: Any, data: list[Tensor]) -> None:
    for ids in data:
        rows = ids.chunk(dist.get_world_size())[dist.get_rank()]
        engine.backward(engine(input_ids=rows, labels=rows).loss)
        engine.step()


class Shaped(nn.Module):
    """A linear layer and a parameter of some shape.

    Args:
        shape: without elements, or ().
        trained: whether the parameter is.
    """

    def __init__(self, shape: tuple[int, ...], *, trained: bool = True) -> None:
        super().__init__()
        self.up, self.lm_head = nn.Linear(HIDDEN, HIDDEN, bias=False), nn.Linear(HIDDEN, VOCABULARY)
        self.odd = nn.Parameter(torch.ones(shape), requires_grad=trained)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.lm_head(self.up(x)) + self.odd.sum()
        return y.square().mean()


def train_empty(stage: int, optimizer: dict[str, Any], folder: str) -> tuple[list[str], list[str]]:
    """Some updates of a model with a parameter without elements, again from a checkpoint.

    Returns:
        The names of the optimizer's groups; and of the weights that differ, on rank 0.
    """
    config = {"train_batch_size": 4, "zero_optimization": {"stage": stage}, "optimizer": optimizer}
    weights = []
    for saves in (True, False):
        torch.manual_seed(0)
        engine = megalr.initialize(model=Shaped((0, HIDDEN)), config=config)[0]
        for update in range(3):
            if update == 2:
                act = megalr.save_checkpoint if saves else megalr.load_checkpoint
                act(engine, Path(folder))
            elif update < 2 and not saves:
                continue
            x = torch.full((2, HIDDEN), 1.0 + update + dist.get_rank())
            engine.backward(engine(x))
            engine.step()
        weights.append(megalr.consolidated_state_dict(engine))
        groups = [group["name"] for group in engine.basic_optimizer.all_groups]
        engine.destroy()
    first, second = weights
    if first is None or second is None:
        return groups, []
    assert first["odd"].shape == (0, HIDDEN)
    return groups, [name for name, weight in first.items() if not torch.equal(weight, second[name])]


def scalars(way: str, *, trained: bool) -> tuple[str, bool]:
    """What is said about a parameter without dimensions, and whether the model is still what it was.

    Args:
        way: "initialize", "build_optimizer", or "plain", that is DeepSpeed without megalr.
        trained: whether the parameter is.
    """
    torch.manual_seed(0)
    model = Shaped((), trained=trained)
    config = {
        "train_batch_size": 4,
        "zero_allow_untested_optimizer": True,
        "megalr": {"parametrization": {"type": "low_rank", "rank": 2, "target_modules": ["up"]}},
    }
    try:
        if way == "initialize":
            megalr.initialize(model=model, config=config)
        elif way == "build_optimizer":
            dense = {**config, "megalr": {}}
            deepspeed.initialize(model=model, optimizer=megalr.build_optimizer(model, dense), config=dense)
        else:
            trainable = [p for p in model.parameters() if p.requires_grad]
            deepspeed.initialize(model=model, optimizer=torch.optim.SGD(trainable), config={**config, "megalr": {}})
    except (megalr.UserError, RuntimeError) as error:
        return str(error), isinstance(model.up, nn.Linear)
    return "", isinstance(model.up, nn.Linear)


def metric(given: dict[str, float] | None) -> tuple[str, float, float]:
    """A step with a schedule that looks at a metric: what is said, the change of a weight, and the rate after it."""
    torch.manual_seed(0)
    model = Shaped((1,))
    config = {
        "train_batch_size": 4,
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
    }
    engine = megalr.initialize(
        model=model,
        config=config,
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0),
    )[0]
    before, said = model.odd.item(), ""
    try:
        for _ in range(3):
            engine.backward(engine(torch.ones(2, HIDDEN)))
            engine.step(**({} if given is None else {"lr_kwargs": given}))
    except megalr.UserError as error:
        said = str(error)
    result = said, model.odd.item() - before, engine.get_lr()[0]
    engine.destroy()
    return result
