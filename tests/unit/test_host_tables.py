"""Each file of hosts/ declares what it reads of an engine, no more and no less, so that a contract can hold it.

tests/deepspeed/test_contract.py asserts on engines that what is declared is there.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import logging
import os
import sys
import weakref
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from megalr.hosts.base import PUBLIC
from tests.structure import HOSTS, attributes, imported, last_name, sources, tables

# What hosts/ calls engines and things of theirs, in variables: every attribute of these has to be declared.
ENGINE_OBJECTS = {"_engine", "engine", "mapping", "mpu", "pipeline", "schedule", "sharded", "spec", "wrapper", "zero"}
# torch's own protocol of optimizers and schedules, which wrappers follow, and what configurations of transformers have.
PROTOCOLS = {"param_groups", "state_dict", "step", "model_type"}
OWN_MARKS = "megalr_"  # what parameters are marked with by megalr begins so


def declared() -> dict[str, set[str]]:
    """What each file declares, whoever's it is."""
    return {file: {name for names in table.values() for name in names} for file, table in tables().items()}


def undeclared(file: str, tree: ast.Module, names: set[str]) -> list[str]:
    """What a file reads of an engine without having declared it.

    That is attributes of ENGINE_OBJECTS, what is imported from an engine, and attributes that none of Python, torch and
    megalr defines.
    """
    known = _known_names()
    read = [(name, line) for owner, name, line in attributes(tree) if owner in ENGINE_OBJECTS or name not in known]
    for name, line in imported(tree):
        if name.startswith("deepspeed.") and not _is_module(name):
            read.append((name.rpartition(".")[2], line))
    free = names | PROTOCOLS | set(PUBLIC)
    return [
        f"megalr/hosts/{file}:{line} reads {name}, which its INTERNALS lacks"
        for name, line in read
        if name not in free and not name.startswith(OWN_MARKS) and not _is_module(f"deepspeed.{name}")
    ]


def unread(file: str, tree: ast.Module, names: set[str]) -> list[str]:
    """What a file has declared and does not read."""
    used: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(last_name(target) == "INTERNALS" for target in node.targets):
            continue
        used |= {name for _, name, _ in attributes(node)}
        used |= {name.rpartition(".")[2] for name, _ in imported(node)}
        used |= {str(each.value) for each in ast.walk(node) if isinstance(each, ast.Constant)}
    return [f"megalr/hosts/{file} does not read {name}, which its INTERNALS has" for name in sorted(names - used)]


def _is_module(name: str) -> bool:
    """Whether a dotted name is a module's; found by its file, since importing an engine takes seconds."""
    package, *parts = name.split(".")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return False
    path = Path(spec.submodule_search_locations[0], *parts)
    return path.is_dir() or path.with_suffix(".py").is_file()


@cache
def _known_names() -> set[str]:
    objects: list[Any] = [torch, torch.Tensor, nn, nn.Module, nn.Parameter, torch.optim, torch.optim.lr_scheduler]
    objects += [
        dist,
        type(dist.group),
        str,
        list,
        dict,
        tuple,
        set,
        int,
        float,
        Exception,
        type,
        os,
        sys,
        json,
        inspect,
    ]
    objects += [inspect.Signature, inspect.BoundArguments, weakref, logging, logging.Logger, logging.LogRecord]
    names = {name for each in objects for name in dir(each)}
    for module in sources():
        names |= set(module.name.split("."))
        for node in ast.walk(module.tree):
            match node:
                case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.Name(id=name, ctx=ast.Store()):
                    names.add(name)
                case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                    names.add(name)
    return names


def _tree(file: str) -> ast.Module:
    return next(module.tree for module in sources() if module.file == f"{HOSTS}/{file}")


@pytest.mark.parametrize("file", list(tables()))
def test_a_file_declares_what_it_reads(file):
    names = declared()[file]
    assert undeclared(file, _tree(file), names) == []
    assert unread(file, _tree(file), names) == []


@pytest.mark.parametrize(
    ("planted", "name"),
    [
        ("def f(engine):\n    return engine.device", "device"),
        ("def f(self):\n    return self._engine.optimizer", "optimizer"),
        ("def f(parameter):\n    return parameter.ds_status", "ds_status"),
        ("def f(parameter):\n    return getattr(parameter, 'ds_quant_scale', None)", "ds_quant_scale"),
        ("def f():\n    from deepspeed.utils import safe_get_full_grad", "safe_get_full_grad"),
    ],
)
def test_what_is_not_declared_is_found(planted, name):
    (found,) = undeclared("planted.py", ast.parse(planted), set())
    assert f"planted.py:2 reads {name}," in found
    assert undeclared("planted.py", ast.parse(planted), {name}) == []


def test_what_is_declared_in_vain_is_found():
    planted = ast.parse("INTERNALS = {'x': ('ds_id', 'ds_shape')}\ndef f(p):\n    return p.ds_id")
    assert unread("planted.py", planted, {"ds_id", "ds_shape"}) == [
        "megalr/hosts/planted.py does not read ds_shape, which its INTERNALS has"
    ]
