"""Recipes of the comparison of methods: whose embeddings and head are whose, and what is refused."""

import sys

import pytest

from megalr.comparison.runs import Recipe
from megalr.errors import UserError
from megalr.rules.registry import RULES
from tests.unit.method_recipes import compare, method

BOTH_ENDS = {"head": True, "embeddings": True}


def settings_of(recipe, index):
    """(learning rate, whether a rule trains it) of each group of a method's first run."""
    run = recipe.grid(recipe.methods[index])[0]
    return {group.name: (group.settings.lr, group.rule is not None) for group in run.groups(recipe.model)}


def test_a_rule_that_trains_embeddings_and_head_has_its_own_rate_there(write, launchers):
    given = {"AdamW": method(), "SCALE": method(type="SCALE", params=BOTH_ENDS)}
    for one in given.values():
        one["learning_rates"] = [2e-3]
    recipe = Recipe(write(methods=given), launchers / "models")
    assert settings_of(recipe, 0)["embedding"] == (1e-2, False)
    own = settings_of(recipe, 1)
    assert own["embedding"] == own["head"] == own["matrices"] == (2e-3, True)
    assert own["norm"] == (3e-3, False)
    compare(write(methods=given, seeds=[0]), launchers)
    table = (write().parent / "out put" / "table.md").read_text()
    assert "not by AdamW as for all others: SCALE (embeddings and head)." in table


@pytest.mark.parametrize(("one", "other"), [("head", "embeddings"), ("embeddings", "head")])
def test_a_rule_with_one_end_alone_is_refused(write, launchers, one, other):
    given = {"a": method(type="SCALE", params={one: True})}
    with pytest.raises(UserError, match=f'leaves the {other} to AdamW(.|\n)*write "{other}": true, too'):
        Recipe(write(methods=given), launchers / "models")


def test_a_head_left_to_adamw_is_compared_with_the_others_heads(write, launchers):
    base = {"optimizer": {"params": {"norm": {"lr": 1e-2}}}}  # so embeddings and head follow the method's rate
    given = {"a": method(), "b": {**method(type="SCALE", params={"embeddings": True}), "learning_rates": [0.02]}}
    with pytest.raises(UserError, match=r'group "head" would be 0.02(.|\n)*optimizer\.params\.embedding\.lr'):
        Recipe(write(base=base, methods=given), launchers / "models")
    given["b"]["optimizer"]["params"] = BOTH_ENDS
    Recipe(write(base=base, methods=given), launchers / "models")


VELORA = {"type": "velora", "groups": 4, "target_modules": ["down_proj"]}
LOW_RANK = {"type": "low_rank", "rank": 4}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"methods": {"a": method(type="AdamW", params=3)}}, 'method "a": optimizer.params must be an object, not 3'),
        ({"methods": {"a": {**method(), "megalr": 3}}}, 'method "a": megalr must be an object, not 3'),
        ({"base": {"optimizer": 3}}, "the base's optimizer must be an object, not 3"),
        ({"base": {"optimizer": {"params": [3]}}}, "the base's optimizer.params must be an object"),
        ({"base": {"megalr": "x"}}, "the base's megalr must be an object"),
        ({"base": {"zero_optimization": {"stage": 7}}}, '"stage": Input should be 0, 1, 2'),
        ({"base": {"zero_optimization": 3}}, "DeepSpeed refuses the configuration"),
        ({"base": {"scheduler": {"type": "WarmupLRR"}}}, "scheduler.type is 'WarmupLRR'"),
        (
            {"methods": {"a": {**method(), "megalr": {"activations": {**VELORA, "groups": 7}}}}},
            "does not divide the 40",
        ),
        (
            {"methods": {"a": {**method(), "megalr": {"activations": {**VELORA, "target_modules": ["w1"]}}}}},
            "megalr.activations.target_modules",
        ),
        (
            {"methods": {"a": {**method(), "megalr": {"activations": VELORA, "parametrization": LOW_RANK}}}},
            "megalr.activations.target_modules",
        ),
    ],
)
def test_what_a_run_would_fail_with_is_said_before_the_first(write, launchers, changes, words):
    with pytest.raises(UserError) as error:
        Recipe(write(**changes), launchers / "models")
    assert words in str(error.value)


def test_compressed_activations_and_several_processes_are_accepted(write, launchers):
    given = {"a": {**method(), "megalr": {"activations": VELORA}}}
    Recipe(write(methods=given, batch_size=8, micro_batch_size=2), launchers / "models", world_size=2)


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
