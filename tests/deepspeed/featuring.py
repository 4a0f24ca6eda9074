"""What the ranks run in the tests of DeepSpeed's features: keys of the JSON, methods of the engine, experts."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Sequence
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

import megalr
from megalr.errors import UserError
from megalr.hosts.deepspeed_config import deepspeed_section
from tests.deepspeed import training

WIDTH, ROWS = 6, 2
SETTINGS = {"lr": 1e-2, "weight_decay": 0.0}
Routes = Sequence[Sequence[Sequence[int]]]  # the experts of each rank, by micro-batch


class Experts(nn.Module):
    """A linear layer, two experts of which each call names those that it uses, and another linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mixture = Mixture()

    def forward(self, x: Tensor, experts: Sequence[int]) -> Tensor:
        """(n, WIDTH) to a loss."""
        loss: Tensor = self.last(self.mixture(self.first(x), experts)).square().mean()
        return loss


class Mixture(nn.Module):
    """The experts: a leaf to ZeRO's stage 3."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x: Tensor, experts: Sequence[int]) -> Tensor:
        """(n, WIDTH) to the same."""
        for index in experts:
            x = x + self.experts[index](x)
        return x


def train(stage: int, accumulation: int, changes: dict[str, Any]) -> dict[str, Tensor] | None:
    """:func:`tests.deepspeed.training.train`, also where each ``engine.step()`` ends an update."""
    try:
        config = training.configuration(stage, accumulation, **changes)
        engine = training.engine_of(config)
        if config.get("managed_gradient_accumulation", True):
            training.run_steps(engine, training.batches(20))
        else:
            _step_once(engine, training.batches(20), accumulation)
        return training.finish(engine, config)
    finally:
        gc.enable()


def _step_once(engine: Any, data: list[Tensor], accumulation: int) -> None:
    for ids in data:
        for rows in ids.chunk(accumulation):
            own = rows.chunk(dist.get_world_size())[dist.get_rank()]
            engine.backward(engine(input_ids=own, labels=own).loss)
        engine.step()


def route(stage: int, *turns: Routes, bf16: bool = False, **zero: Any) -> tuple[float | None, str]:
    """Three updates in which ranks use the experts that ``turns`` say, by turns.

    Returns:
        The largest relative error of a weight against plain PyTorch, on rank 0; how the run ended early.
    """
    config = _config(stage, len(turns[0]), **zero)
    if bf16:
        config |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    plain, engine = _pair(config)

    def losses(update: int) -> list[list[Callable[[nn.Module], Tensor]]]:
        routes = turns[update % len(turns)]

        def loss(pass_: int, rank: int) -> Callable[[nn.Module], Tensor]:
            x = _rows(update, pass_, rank)
            return lambda model: model(x.to(next(model.parameters()).dtype), routes[pass_][rank])

        return [[loss(pass_, rank) for rank in range(2)] for pass_ in range(len(routes))]

    try:
        return _compared(plain, engine, [losses(update) for update in range(3)]), ""
    except UserError as error:
        engine.destroy()
        return None, str(error)


def twice(stage: int, accumulation: int, **changes: Any) -> str:
    """How an update ends in which each micro-batch has two backward passes."""
    engine = _pair(_config(stage, accumulation) | changes)[1]
    try:
        for pass_ in range(accumulation):
            for loss in (0, 1):
                engine.backward(engine(_rows(loss, pass_, dist.get_rank()), (0, 1)))
            if changes == {} or pass_ == accumulation - 1:
                engine.step()
        return f"{engine.basic_optimizer.updates} update"
    except UserError as error:
        return str(error)
    finally:
        engine.destroy()


def resize(stage: int, folder: str) -> tuple[float | None, str]:
    """Three updates of two micro-batches, three of three, then in the next one another size.

    Args:
        stage: ZeRO's.
        folder: for a checkpoint.

    Returns:
        See :func:`route`.
    """
    plain, engine = _pair(_config(stage, 2))

    def losses(update: int, passes: int) -> list[list[Callable[[nn.Module], Tensor]]]:
        def loss(pass_: int, rank: int) -> Callable[[nn.Module], Tensor]:
            x = _rows(update, pass_, rank)
            return lambda model: model(x, (0, 1))

        return [[loss(pass_, rank) for rank in range(2)] for pass_ in range(passes)]

    optimizer = torch.optim.AdamW(plain.parameters(), **SETTINGS)
    _train(plain, optimizer, engine, [losses(update, 2) for update in range(3)])
    engine.set_train_batch_size(2 * 3 * ROWS)
    _train(plain, optimizer, engine, [losses(update, 3) for update in range(3, 6)])
    error = _error(plain, engine)
    megalr.save_checkpoint(engine, folder)
    messages = []
    calls: dict[str, Callable[[], Any]] = {
        "set_train_batch_size": lambda: engine.set_train_batch_size(12),
        "set_train_micro_batch_size": lambda: engine.set_train_micro_batch_size(12),
        "load_checkpoint": lambda: engine.load_checkpoint("nowhere"),
        "megalr.load_checkpoint": lambda: megalr.load_checkpoint(engine, folder),
    }
    for after in (lambda: engine.backward(losses(6, 1)[0][dist.get_rank()](engine)), engine.step):
        after()
        for call in calls.values():
            try:
                call()
            except UserError as found:
                messages.append(str(found))
    engine.destroy()
    return error, "\n".join(messages)


def weights_alone(stage: int, bf16: bool, folder: str, how: dict[str, bool]) -> list[float] | None:
    """Two checkpoints, and a fresh engine that loads the weights of the older.

    Returns:
        The largest relative difference of a weight from each checkpoint's, and after an update with a learning rate of
        zero from the older one's; on rank 0.
    """
    config = training.configuration(stage, bf16={"enabled": bf16})
    data = training.batches(4)
    engine = training.engine_of(config)
    saved = []
    for tag in ("older", "newer"):
        training.run_steps(engine, data[:2])
        engine.save_checkpoint(folder, tag=tag)
        saved.append(megalr.consolidated_state_dict(engine))
    engine.destroy()
    config["optimizer"] = {"type": "AdamW", "params": {"lr": 0.0}}
    engine = training.engine_of(config)
    engine.load_checkpoint(folder, tag="older", load_lr_scheduler_states=False, **how)
    loaded = megalr.consolidated_state_dict(engine)
    training.run_steps(engine, data[:1])
    stepped = megalr.consolidated_state_dict(engine)
    engine.destroy()
    if loaded is None:
        return None
    older, newer = saved
    return [_difference(loaded, older), _difference(loaded, newer), _difference(stepped, older)]


def another_json(changes: dict[str, Any], *, as_callable: bool) -> str:
    """An optimizer for one JSON, which the user then hands to DeepSpeed with another: with which words that ends."""
    config = _config(1, 1)
    model = Experts()
    given = (lambda _: megalr.build_optimizer(model, config)) if as_callable else megalr.build_optimizer(model, config)
    other = copy.deepcopy(config)
    for section, values in changes.items():
        other[section] = {**other.get(section, {}), **values} if isinstance(values, dict) else values
    try:
        deepspeed.initialize(model=model, optimizer=given, config=deepspeed_section(other))
    except UserError as error:
        return str(error)
    return ""


def _config(stage: int, accumulation: int, **zero: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 0,
            "leaf_module": {"classes": ["Mixture"]},
            **zero,
        },
        "optimizer": {"type": "AdamW", "params": SETTINGS},
    }


def _pair(config: dict[str, Any]) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = Experts()
    return copy.deepcopy(model), megalr.initialize(model=model, config=config)[0]


def _rows(*where: int) -> Tensor:
    seed = sum(number * 10**place for place, number in enumerate(where))
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(seed))


def _compared(plain: nn.Module, engine: Any, updates: list[Any]) -> float | None:
    _train(plain, torch.optim.AdamW(plain.parameters(), **SETTINGS), engine, updates)
    error = _error(plain, engine)
    engine.destroy()
    return error


def _train(plain: nn.Module, optimizer: Any, engine: Any, updates: list[Any]) -> None:
    """The same losses for both: those of this rank for the engine, those of all for the plain model."""
    for passes in updates:
        optimizer.zero_grad()
        for losses in passes:
            for loss in losses:
                (loss(plain) / len(losses) / len(passes)).backward()
            engine.backward(losses[dist.get_rank()](engine))
            engine.step()
        for parameter in plain.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()


def _error(plain: nn.Module, engine: Any) -> float | None:
    got = megalr.consolidated_state_dict(engine)
    return None if got is None else _difference(got, plain.state_dict())


def _difference(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert got.keys() == expected.keys()
    return max(((got[name] - w).norm() / w.norm()).item() for name, w in expected.items())
