"""Which methods there are: found in the package, each by the name that it declares."""

import importlib
import inspect
import pkgutil
import sys

import pytest

import megalr
import megalr.layers
import megalr.rules
from megalr.discovery import declared_classes
from megalr.layers.base import Parametrization
from megalr.layers.registry import PARAMETRIZATIONS
from megalr.rules.base import Rule
from megalr.rules.registry import RULES


def own(registry):
    """The entries that no test's plugin has added."""
    return {name: cls for name, cls in registry.items() if cls is None or cls.__module__.startswith("megalr.")}


def concrete(package, base):
    """The classes of a package that could be methods."""
    modules = [
        importlib.import_module(f"{package.__name__}.{info.name}") for info in pkgutil.iter_modules(package.__path__)
    ]
    defined = {value for module in modules for value in vars(module).values() if isinstance(value, type)}
    return {cls for cls in defined if issubclass(cls, base) and not inspect.isabstract(cls)}


def test_no_rule_of_the_package_is_forgotten():
    known = set(own(RULES).values()) - {None}
    forgotten = {cls for cls in concrete(megalr.rules, Rule) - known if not hasattr(cls, "type_name")}
    assert not forgotten and len(known) >= 17
    assert all(RULES[rule.type_name] is rule for rule in known)


def test_no_parametrization_of_the_package_is_forgotten():
    assert concrete(megalr.layers, Parametrization) <= set(PARAMETRIZATIONS.values())
    assert all(kind().type == name for name, kind in own(PARAMETRIZATIONS).items())


def test_the_order_is_the_alphabets_behind_what_needs_no_method():
    rules, parametrizations = list(own(RULES)), list(own(PARAMETRIZATIONS))
    assert rules == ["AdamW", *sorted(rules[1:], key=str.lower)]
    assert parametrizations == ["full", *sorted(parametrizations[1:])]


MODULE = """
class {name}(Base):
    type_name = "{declared}"

class Variant({name}):
    pass
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package with a base class and two methods in it, of which one module names the other's class."""
    folder = tmp_path / "some_methods"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "base.py").write_text('class Base:\n    type_name = ""\n')
    (folder / "two.py").write_text(
        "from some_methods.base import Base\n" + MODULE.format(name="Two", declared="second")
    )
    (folder / "one.py").write_text(
        "from some_methods.two import Base, Two\n" + MODULE.format(name="One", declared="first")
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("some_methods")
    for name in [name for name in sys.modules if name.startswith("some_methods")]:
        del sys.modules[name]


def test_a_class_counts_once_where_it_is_defined_and_by_its_own_declaration(package):
    base = importlib.import_module("some_methods.base").Base
    found = declared_classes(package, base, "type_name")
    assert [(name, cls.__name__) for name, cls in found] == [("first", "One"), ("second", "Two")]


def test_a_name_that_is_taken_is_refused_with_all_that_are():
    with pytest.raises(megalr.UserError, match='"muon" already: choose another name than AdamW, AdamMini, '):
        megalr.register_rule("muon")(RULES["Muon"])
    with pytest.raises(megalr.UserError, match='"lora" already: choose another name than full, cola, '):
        megalr.register_parametrization("lora")(PARAMETRIZATIONS["lora"])
