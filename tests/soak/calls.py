"""Calls of the library: arguments of other types, and calls in another order."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from tests.soak.trial import Case

CONFIG = {
    "train_batch_size": 2,
    "zero_optimization": {"stage": 2},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    "megalr": {"parametrization": {"type": "low_rank", "rank": 4}},
}
PROGRAM = """
import pathlib, sys, types
import torch
import megalr
from megalr.processes import free_port
from tests.small_llama import small_llama
import os
os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
config = {config}
model = small_llama()
try:
    {call}
except megalr.UserError as error:
    print("error:", error, file=sys.stderr)
    sys.exit(2)
"""
NO_CONFIGS = ("None", "1", "[]", '"nowhere.json"', '""', "b'x'", '"."', "{1: 2}", "object()", "config.items()")
NO_MODELS = (
    "None",
    "1",
    '"model"',
    "type(model)",
    "torch.nn.Module()",
    "torch.nn.Linear(4, 4)",
    "list(model.parameters())",
)
NO_ENGINES = ("None", "1", '"run"', "model", "type(model)", "torch.optim.AdamW(model.parameters())")
NO_FOLDERS = ("None", "1", '"nowhere"', '""', "[]", '"text.txt"', "b'x'", '"."')
WITH_CONFIG = {
    "MegalrConfig.from_json": "megalr.MegalrConfig.from_json({})",
    "parametrize": "megalr.parametrize(model, {})",
    "build_optimizer": "megalr.build_optimizer(model, {})",
    "initialize": "megalr.initialize(model, {})",
    "trainer_optimizer": "megalr.trainer_optimizer(types.SimpleNamespace(deepspeed={}))",
}
WITH_MODEL = {
    "parametrize": "megalr.parametrize({}, config)",
    "build_optimizer": "megalr.build_optimizer({}, config)",
    "initialize": "megalr.initialize({}, config)",
}
WITH_ENGINE = {
    "consolidated_state_dict": "megalr.consolidated_state_dict({})",
    "save_checkpoint": 'megalr.save_checkpoint({}, "new")',
    "load_checkpoint": 'megalr.load_checkpoint({}, "checkpoints")',
    "attach_guard": "megalr.attach_guard({})",
}
ENGINE = "engine, *_ = megalr.initialize(model, config)"
# What is called, and what is named.
ORDERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("megalr.build_optimizer(model, config)", ("parametrize",)),
    ("megalr.parametrize(megalr.parametrize(model, config), config)", ("parametri",)),
    ("megalr.initialize(megalr.parametrize(model, config), config)", ("parametri",)),
    ("megalr.initialize(model, config, optimizer=torch.optim.SGD(model.parameters()))", ("optimizer",)),
    ("megalr.initialize(model, config, model_parameters=list(model.parameters())[1:])", ("model_parameters",)),
    ("megalr.initialize(model, config, nonsense=1)", ("nonsense",)),
    ("megalr.initialize(model, config, training_data=5)", ("training_data",)),
    ("megalr.initialize(model, config, lr_scheduler=5)", ("lr_scheduler",)),
    (
        "megalr.initialize(model, config, lr_scheduler=torch.optim.lr_scheduler.StepLR("
        "torch.optim.SGD(model.parameters()), 2))",
        ("lr_scheduler",),
    ),
    ("megalr.initialize(model, config, collate_fn=5)", ("collate_fn",)),
    ("megalr.initialize(model, config, config_params=config)", ("config_params",)),
    (f"{ENGINE}; megalr.initialize(model, config)", ("engine", "parametri")),
    (f"{ENGINE}; megalr.parametrize(model, config)", ("engine", "parametri")),
    ("megalr.parametrize(model, config); megalr.build_optimizer(model, config).step()", ("step", "engine", "gradient")),
    ("model.requires_grad_(False); megalr.initialize(model, config)", ("train", "frozen", "requires_grad")),
    ("model.model.layers[0].requires_grad_(False); megalr.initialize(model, config)", ("frozen", "requires_grad")),
    ("model = torch.compile(model); megalr.initialize(model, config)", ()),
    ("megalr.register_rule(1)(int)", ("register_rule",)),
    ('megalr.register_rule("AdamW")(int)', ("register_rule", "AdamW")),
    ('megalr.register_rule("Mine")(int)', ("register_rule",)),
    ('megalr.register_parametrization("full")(int)', ("register_parametrization", "full")),
    ("megalr.register_parametrization(None)(None)", ("register_parametrization",)),
    ("megalr.register_events(int)(int)", ("register_events",)),
    ("megalr.trainer_optimizer(None)", ("TrainingArguments", "training_args")),
    ("megalr.trainer_optimizer({})", ("TrainingArguments", "training_args")),
    ("megalr.trainer_optimizer(config)", ("TrainingArguments", "training_args")),
)
VALID_TAGS = ('"nothing"',)
EITHER = ("torch.compile", ".step()")  # torch's own optimizers say nothing either where there is no gradient


def wrong_calls(rng: Random) -> Iterator[Case]:
    """All of them."""
    for name, call in WITH_CONFIG.items():
        for value in NO_CONFIGS:
            yield _case(f"{name}: config {value}", call.replace("{}", value), ("config", "json", value.strip("\"'")))
    for name, call in WITH_MODEL.items():
        for value in NO_MODELS:
            yield _case(f"{name}: model {value}", call.replace("{}", value), ("model", "layer", "target_modules"))
    for name, call in WITH_ENGINE.items():
        for value in NO_ENGINES:
            yield _case(f"{name}: engine {value}", call.replace("{}", value), ("engine",))
    for value in NO_FOLDERS:
        named = ("checkpoint", "directory", "folder", value.strip("\"'"))
        yield _case(f"load_checkpoint: {value}", f"{ENGINE}; megalr.load_checkpoint(engine, {value})", named)
        if value not in ('"nowhere"', '"."'):  # where one may save
            yield _case(f"save_checkpoint: {value}", f"{ENGINE}; megalr.save_checkpoint(engine, {value})", named)
    yield from _wrong_arguments()
    for call, names in ORDERS:
        yield _case(call, call, names, "either" if any(word in call for word in EITHER) else "bad")
    del rng


def _wrong_arguments() -> Iterator[Case]:
    """Of the functions that save and load."""
    for tag in (
        "1",
        '""',
        '"nothing"',
        '"../x"',
        '"/tmp/x"',
        '"a/b"',
        '"."',
        '".."',
        '"\\0"',
        "[]",
        '"x" * 300',
        '"latest"',
    ):
        for function in ("save", "load") if tag not in VALID_TAGS else ("load",):
            call = f'{ENGINE}; megalr.{function}_checkpoint(engine, "saved", tag={tag})'
            yield _case(f"{function}_checkpoint: tag {tag}", call, ("tag", "checkpoint"))
    for client in ("1", "[]", "{'a': object()}", "{1: torch.ones(1)}", "{'a': float('nan')}"):
        call = f'{ENGINE}; megalr.save_checkpoint(engine, "new", client_state={client})'
        yield _case(f"save_checkpoint: client_state {client}", call, ("client_state",))
    for keep in ("0", "-1", '"1"', "1.5"):
        call = f'{ENGINE}; megalr.save_checkpoint(engine, "new", keep={keep})'
        yield _case(f"save_checkpoint: keep {keep}", call, ("keep",))


def _case(about: str, call: str, names: tuple[str, ...], expect: str = "bad") -> Case:
    text = PROGRAM.replace("{config}", repr(CONFIG)).replace("{call}", call)
    needs = ("checkpoints",) if "checkpoints" in call else ()
    return Case(about=about, words=("-c", text), names=names, needs=needs, expect=expect)  # type: ignore[arg-type]
