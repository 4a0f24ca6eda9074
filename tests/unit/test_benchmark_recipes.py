"""Recipes of the comparison of methods: whose embeddings and head are whose, and what is refused."""

import pytest

from megalr.benchmarks.runs import Recipe
from megalr.errors import UserError
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
