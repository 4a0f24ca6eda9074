"""The house keeps its shape: engines are known in hosts/ alone, no function hides a module, arrows point down.

The checks read source text. Each is also run on a tree in which an offence is planted.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterable, Iterator

import pytest

from megalr.hosts.base import PUBLIC
from tests.structure import HOSTS, Module, attributes, imported, sources, tables, with_planted

# Packages and modules of megalr, from the bottom up. A module may import from lines above its own, and from its own
# package; "megalr" is the package itself, which offers what is in the lines above.
ORDER = (
    "errors generation version",
    "flags schema seeding disk plugins discovery formatting processes naming agreement timing resources kept",
    "locks",
    "ops layout",
    "rules",
    "hosts",
    "layers",
    "config",
    "roles",
    "optim",
    "guards checkpoint memory",
    "api",
    "megalr",
    "data",
    "train",
    "comparison features maturity methods report webpage",
    "pretrain",
    "commands",
)
PROGRAM = "__main__.py"  # nobody imports it, and it may import everything
NOT_INSTALLED = ("benchmarks", "launchers", "tests")

# Attributes of engines that others have, too. Of these only what is asked of a variable called "engine" counts.
COMMON_WORDS = {"convert", "device", "initialize", "module", "monitor", "optimizer", "replicated", "shape", "topology"}
COMMON_WORDS |= {"zero_grad"}


def internal_names() -> set[str]:
    """Attributes of engines that nobody but hosts/ may name."""
    names = {name for table in tables().values() for attrs in table.values() for name in attrs}
    return names - COMMON_WORDS - set(PUBLIC)


def engines_outside(modules: Iterable[Module], internals: set[str]) -> list[str]:
    """Where an engine is imported, or one of its attributes named, outside of hosts/."""
    found = []
    for module in modules:
        if module.top == HOSTS:
            continue
        for name, line in imported(module.tree):
            if name.partition(".")[0] == "deepspeed":
                found.append(f"{module.file}:{line} imports {name}")
        for owner, name, line in attributes(module.tree):
            if name in internals or (owner in ("engine", "_engine") and name not in PUBLIC):
                found.append(f"{module.file}:{line} names {name}: ask megalr.hosts.host_of(engine)")
    return found


def hidden_modules(modules: Collection[Module]) -> list[str]:
    """Names that a package's __init__ gives to something else than the module of that name."""
    names = {module.name for module in modules}
    found = []
    for module in modules:
        if module.file.endswith("__init__.py"):
            for name, meant, line in _bound(module.tree):
                hidden = f"{module.name}.{name}"
                if hidden in names and meant != hidden:
                    found.append(f"{module.file}:{line} gives the name of the module {hidden} to another thing")
    return found


def _bound(tree: ast.Module) -> Iterator[tuple[str, str, int]]:
    """Names that a module binds or offers: what is meant, if it is imported, and the line."""
    names: dict[str, tuple[str, int]] = {}
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(module=module):
                names |= {(a.asname or a.name): (f"{module}.{a.name}", node.lineno) for a in node.names}
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                names[name] = "", node.lineno
            case ast.Name(id=name, ctx=ast.Store()):
                names[name] = "", node.lineno
    for node in tree.body:
        match node:
            case ast.Assign(targets=[ast.Name(id="__all__")], value=ast.List(elts=elements)):
                for element in elements:
                    names.setdefault(ast.literal_eval(element), ("", element.lineno))  # by a lazy __getattr__
    return ((name, meant, line) for name, (meant, line) in names.items())


def imports_upwards(modules: Collection[Module]) -> list[str]:
    """Imports of what does not stand above the importer in ORDER, and what has no place there."""
    place = {name: index for index, line in enumerate(ORDER) for name in line.split()}
    tops = {module.top for module in modules if module.file != PROGRAM}
    found = [f"{name} has no place in ORDER: give it one" for name in sorted(tops - place.keys())]
    for module in modules:
        if module.file.endswith(PROGRAM):
            continue
        for name, line in imported(module.tree):
            first, _, rest = name.partition(".")
            if first in NOT_INSTALLED:
                found.append(f"{module.file}:{line} imports {first}, which is not installed")
            target = rest.partition(".")[0]
            target = target if target in tops else "megalr"
            upwards = place.get(target, 0) >= place.get(module.top, len(ORDER))
            if first == "megalr" and target != module.top and upwards:
                found.append(f"{module.file}:{line} imports {target}, which does not stand below {module.top}")
    return found


def test_engines_are_known_in_hosts_alone():
    assert engines_outside(sources(), internal_names()) == []


def test_no_package_hides_a_module():
    assert hidden_modules(sources()) == []


def test_packages_point_one_way():
    assert imports_upwards(sources()) == []


@pytest.mark.parametrize(
    ("planted", "words"),
    [
        ("import deepspeed.comm", "imports deepspeed.comm"),
        ("def f():\n    from deepspeed.utils import groups", "imports deepspeed.utils.groups"),
        ("import importlib\nimportlib.import_module('deepspeed')", "imports deepspeed"),
        ("def f(p):\n    return p.ds_numel", "names ds_numel"),
        ("def f(p):\n    return hasattr(p, '_hp_mapping')", "names _hp_mapping"),
        ("def f(loop):\n    loop.engine.micro_steps += 1", "names micro_steps"),
        ("def f(engine):\n    return engine.optimizer.param_groups", "names optimizer"),
        ("def f(engine):\n    return getattr(engine, 'something_new', None)", "names something_new"),
    ],
)
def test_an_engine_named_elsewhere_is_found(planted, words):
    (found,) = engines_outside(with_planted("guards/losses.py", planted), internal_names())
    assert words in found and found.startswith("guards/losses.py")


def test_docstrings_comments_and_the_public_part_are_free():
    text = '"""hasattr(p, "ds_id")"""\n# p.ds_id\ndef f(engine):\n    return engine.step(), {"ds_id": engine.module}\n'
    assert engines_outside(with_planted("guards/losses.py", text), internal_names()) == []


@pytest.mark.parametrize(
    "planted",
    [
        "from megalr.layers.replacement import parametrize as replacement",
        "def replacement():\n    pass",
        "replacement = None",
        "__all__ = ['replacement']",
    ],
)
def test_a_function_that_hides_a_module_is_found(planted):
    (found,) = hidden_modules(with_planted("layers/__init__.py", planted, anew=True))
    assert "gives the name of the module megalr.layers.replacement" in found
    assert hidden_modules(with_planted("layers/__init__.py", "from megalr.layers import replacement", anew=True)) == []


@pytest.mark.parametrize(
    ("file", "planted", "words"),
    [
        ("layout/layout.py", "from megalr.hosts import held", "imports hosts, which does not stand below layout"),
        ("hosts/plain.py", "def f():\n    import megalr.layers", "imports layers, which does not stand below hosts"),
        ("guards/losses.py", "from megalr.memory import formulas", "imports memory, which does not stand below guards"),
        ("optim/clock.py", "from megalr import parametrize", "imports megalr, which does not stand below optim"),
        ("api.py", "import benchmarks.timing", "imports benchmarks, which is not installed"),
        ("planted.py", "", "planted has no place in ORDER"),
    ],
)
def test_an_arrow_that_points_up_is_found(file, planted, words):
    (found,) = set(imports_upwards(with_planted(file, planted))) - set(imports_upwards(sources()))
    assert words in found


def cached_tensors(modules: Iterable[Module]) -> list[str]:
    """Functions whose tensors ``functools`` keeps: what has been made in a FakeTensorMode, say, for ever."""
    found = []
    for module in modules:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.FunctionDef) and "Tensor" in ast.unparse(node.returns or ast.Name("")):
                names = [ast.unparse(decorator) for decorator in node.decorator_list]
                if any("cache" in name for name in names):
                    found.append(f"{module.file}:{node.lineno} keeps the tensors of {node.name}: use megalr.kept.kept")
    return found


def test_tensors_are_kept_by_kept_alone():
    assert cached_tensors(sources()) == []


@pytest.mark.parametrize("decorator", ["cache", "functools.cache", "lru_cache(maxsize=2)", "cached_property"])
def test_a_cache_of_tensors_is_found(decorator):
    planted = with_planted("layers/mora.py", f"@{decorator}\ndef f(x) -> tuple[Tensor, int]:\n    return x, 1")
    assert [line.partition(" keeps ")[2] for line in cached_tensors(planted)] == [
        "the tensors of f: use megalr.kept.kept"
    ]
