"""What makes two runs of a comparison the same, so that a result is used again."""

import json
import sys

import pytest

from megalr.comparison.runs import Recipe
from megalr.rules.registry import RULES
from tests.unit.comparison_recipes import SHAPE, content, method


def test_the_key_names_what_determines_a_run(write, launchers):
    def keys(**changes):
        recipe = Recipe(write(**changes), launchers / "models")
        return [run.key for m in recipe.methods for run in recipe.grid(m)]

    first = keys()
    assert len(set(first)) == len(first) == 6
    assert keys() == first
    assert keys(seeds=[0, 5]) == first
    renamed = dict(zip(("x", "y"), content()["methods"].values(), strict=True))
    assert keys(methods=renamed) == first
    for change in ({"steps": 4}, {"batch_size": 4}, {"sequence_length": 8}, {"grid_seed": 1}):
        assert not set(first) & set(keys(**change))
    base = {**content()["base"], "gradient_clipping": 2.0}
    assert not set(first) & set(keys(base=base))
    base = {**content()["base"], "comet": {"enabled": False, "workspace": "ours"}}
    assert keys(base=base) != first
    with_key = [keys(base={**base, "comet": {**base["comet"], "api_key": key}}) for key in ("one", "rotated")]
    assert with_key[0] == with_key[1] == keys(base=base)


def test_the_key_follows_the_text_and_the_shape_not_their_names(write, launchers):
    path = write(text={"train": ["words.txt"]})
    text = path.parent / "words.txt"

    def key():
        recipe = Recipe(path, launchers / "models")
        assert str(text) in recipe.run(recipe.methods[0], 1.0, 0).flags
        return recipe.run(recipe.methods[0], 1.0, 0).key

    text.write_text("one")
    first = key()
    text.write_text("two")
    assert key() != first
    text.write_text("one")
    assert key() == first
    (path.parent / "small.json").write_text(json.dumps({**SHAPE, "intermediate_size": 44}))
    assert key() != first


@pytest.mark.parametrize(
    ("named", "file"), [("~/words.txt", "words.txt"), ("~/**/*.txt", "a/b/words.txt"), ("~/[1].txt", "[1].txt")]
)
@pytest.mark.parametrize("flag", [True, False])
def test_the_key_follows_the_text_however_it_is_named(write, launchers, tmp_path, monkeypatch, named, file, flag):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = write() if flag else write(text={"train": [named]})
    (tmp_path / "1.txt").write_text("what the pattern [1].txt stands for where there is no such file")
    text = tmp_path / file
    text.parent.mkdir(parents=True, exist_ok=True)

    def key(content):
        text.write_text(content)
        recipe = Recipe(path, launchers / "models", ([named], ()) if flag else None)
        return recipe.run(recipe.methods[0], 1.0, 0).key

    first = key("one")
    assert key("two") != first
    assert key("one") == first


RULE = """
from dataclasses import dataclass
import megalr
from megalr.rules.muon import Muon

@megalr.register_rule("Mine")
@dataclass(frozen=True, kw_only=True)
class Mine(Muon):
    pass
"""


@pytest.fixture
def registry():
    """Rules and modules of a test are forgotten after it."""
    rules, modules = RULES.copy(), sys.modules.copy()
    yield
    RULES.clear()
    RULES.update(rules)
    for name in set(sys.modules) - set(modules):
        if name.startswith("own_"):
            del sys.modules[name]


def key_of(recipe, method_index=0):
    return recipe.grid(recipe.methods[method_index])[0].key


def test_plugins_of_the_base_lie_beside_the_recipe(write, launchers, registry):
    base = {"megalr": {"plugins": ["own.py"]}, "optimizer": {"params": {"embedding": {"lr": 1}, "norm": {"lr": 1}}}}
    path = write(base=base, methods={"a": method(type="Mine")})
    (path.parent / "own.py").write_text(RULE)
    recipe = Recipe(path, launchers / "models")
    assert recipe.grid(recipe.methods[0])[0].megalr.plugins == (str(path.parent / "own.py"),)
    first = key_of(recipe)
    (path.parent / "own.py").write_text(RULE + "\n")
    assert key_of(Recipe(path, launchers / "models")) != first


@pytest.mark.parametrize("named", [True, False])  # False: registered by whoever imports it, as an entry point is
def test_the_key_follows_the_code_of_installed_plugins(write, launchers, registry, tmp_path, monkeypatch, named):
    package = tmp_path / f"own_{named}"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "rules.py").write_text(RULE)
    (package / "used.py").write_text("a = 1")
    monkeypatch.syspath_prepend(tmp_path)
    module = f"{package.name}.rules"
    if not named:
        __import__(module)
    one = {**method(type="Mine"), "megalr": {"plugins": [module]} if named else {}}
    path = write(methods={"a": one, "b": method()})
    first, other = (key_of(Recipe(path, launchers / "models"), index) for index in (0, 1))
    assert key_of(Recipe(path, launchers / "models")) == first
    (package / "used.py").write_text("a = 2")
    again = Recipe(path, launchers / "models")
    assert key_of(again) != first
    assert key_of(again, 1) == other
