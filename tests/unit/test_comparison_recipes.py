"""Recipes of the comparison of methods: whose embeddings and head are whose, and what is refused."""

from pathlib import Path

import pytest

from megalr.comparison.runs import Recipe
from megalr.errors import UserError
from tests.unit.comparison_recipes import compare, method

ROOT = Path(__file__).parents[2]
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


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stepps": 3}, 'did you mean "steps"'),
        ({"steps": None}, 'needs "steps"'),
        ({"steps": 0}, "steps is 0"),
        ({"base": None}, 'needs "base"'),
        ({"base": "none.json"}, "no DeepSpeed configuration"),
        ({"base": {"optimizer": {"params": {"lr": 1}}}}, "the base sets optimizer.params.lr"),
        ({"methods": {}}, 'needs "methods"'),
        ({"model": "gone"}, "no model called gone"),
        ({"seeds": [1, 1]}, "names one twice"),
        ({"text": {"trian": ["x"]}}, 'did you mean "train"'),
        ({"methods": {"a": {"optimizer": {"type": "AdamW"}}}}, "needs learning_rates"),
        ({"methods": {"a": {"learning_rates": [1]}}}, 'needs "optimizer"'),
        ({"methods": {"a": method(type="AdamV")}}, "method \"a\": optimizer.type is 'AdamV'"),
        ({"methods": {"a": method(type="AdamW", params={"embedding": {"lr": 1}})}}, "optimizer.params.embedding"),
        ({"methods": {"a": method(type="AdamW", params={"norm": {"lr": 1}})}}, "optimizer.params.norm"),
        ({"methods": {"a": method(type="Muon", params={"adamw": {"lr": 1}})}}, "optimizer.params.adamw"),
        ({"methods": {"a": method(type="AdamW", params={"lr": 1})}}, 'write "learning_rates" instead'),
        ({"methods": {"a": method(type="AdamW", params={"eps": 1e-6})}}, "which the base sets for all"),
        ({"methods": {"a": {**method(), "learning_rates": [1, 1]}}}, "twice"),
        ({"methods": {"a": {**method(), "learning_rates": ["x"]}}}, "positive numbers"),
        ({"methods": {"a": {**method(), "megalr": {"seed": 1}}}}, "recipe's seeds"),
        ({"methods": {"a": {**method(), "megalr": {"parametrization": {"type": "projected", "rank": 99}}}}}, "99"),
    ],
)
def test_mistakes_in_a_recipe(write, launchers, changes, words):
    with pytest.raises(UserError) as error:
        Recipe(write(**changes), launchers / "models")
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [("steps: [", "not valid YAML"), ("- 1", "must hold a mapping"), ("steps: 1\nsteps: 2", "comes twice")],
)
def test_what_is_no_recipe(write, launchers, text, words):
    with pytest.raises(UserError, match=words):
        Recipe(write(text), launchers / "models")
    with pytest.raises(UserError, match="no recipe at"):
        Recipe(write(text).parent / "none.yaml", launchers / "models")


def test_methods_that_would_train_norms_differently_are_refused(write, launchers):
    base = {"optimizer": {"params": {"embedding": {"lr": 1e-2}}}}  # so norms follow the method's rate
    with pytest.raises(UserError, match=r"write optimizer\.params\.norm\.lr in the base"):
        Recipe(write(base=base), launchers / "models")
    base["optimizer"]["params"]["norm"] = {"lr": 1e-2}
    both = {"a": method(), "b": method(type="GaLoreAdamW", params={"rank": 4})}  # whose eps is 1e-6 by default
    with pytest.raises(UserError, match=r"write optimizer\.params\.embedding\.eps in the base"):
        Recipe(write(base=base, methods=both), launchers / "models")


def test_numbers_without_a_dot_are_numbers(write, launchers):
    path = write()
    path.write_text(path.read_text().replace("0.04", "4e-2"))
    assert Recipe(path, launchers / "models").methods[0].rates == (0.01, 0.02, 0.04)


@pytest.mark.parametrize(
    ("name", "count", "ranks"),
    [
        ("projected", 11, {None, 16, 32}),
        ("merge_rounding", 3, {32}),
        ("paper_tiny", 19, {None, 32}),
        ("paper_tiny_long", 2, {32}),
        ("paper_smoke", 8, {None, 32}),
        ("paper_60m", 19, {None, 1, 128}),
        pytest.param("paper_130m", 19, {None, 1, 256}, marks=pytest.mark.slow),
        pytest.param("paper_350m", 19, {None, 1, 256}, marks=pytest.mark.slow),
        ("paper_1b", 19, {None, 1, 512}),
    ],
)
def test_the_shipped_recipes_are_valid(name, count, ranks):
    recipe = Recipe(ROOT / "launchers" / "recipes" / f"{name}.yaml", ROOT / "launchers" / "models")
    assert len(recipe.methods) == count
    assert {run.rank for m in recipe.methods for run in recipe.grid(m)} == ranks


def test_every_shipped_recipe_is_tested():
    assert {path.stem for path in (ROOT / "launchers" / "recipes").glob("*.yaml")} == {
        "merge_rounding",
        "paper_130m",
        "paper_1b",
        "paper_350m",
        "paper_60m",
        "paper_smoke",
        "paper_tiny",
        "paper_tiny_long",
        "projected",
    }


def test_the_papers_recipes_leave_eps_to_the_rules():
    recipe = Recipe(ROOT / "launchers" / "recipes" / "paper_60m.yaml", ROOT / "launchers" / "models")
    methods = {method.name: method for method in recipe.methods}
    groups = {name: recipe.grid(methods[name])[0].groups(recipe.model) for name in ("GaLore", "full rank, AdamW")}
    eps = {name: {g.name: g.settings.eps for g in found} for name, found in groups.items()}
    assert eps["GaLore"] == {"matrices": 1e-6, "embedding": 1e-8, "norm": 1e-8}
    assert eps["full rank, AdamW"] == {"trunk": 1e-8, "embedding": 1e-8, "norm": 1e-8}


def test_another_text_from_the_command_line(write, launchers, tmp_path):
    recipe = write(text={"train": ["words.txt"], "validation": ["kept.txt"], "max_eval_tokens": 7})
    other = tmp_path / "other.txt"
    other.write_text("one")
    read = Recipe(recipe, launchers / "models", ([str(other)], ()))
    one = read.run(read.methods[0], 1.0, 0)
    assert one.flags[one.flags.index("--dataset") + 1] == str(other)
    assert "--eval-dataset" not in one.flags  # the recipe's would be of another text
    assert one.flags[one.flags.index("--max-eval-tokens") + 1] == "7"
    with pytest.raises(UserError, match="name the text to train on"):
        compare(recipe, launchers, "--eval-dataset", str(other))


VELORA = {"type": "velora", "groups": 4, "target_modules": ["down_proj"]}
LOW_RANK = {"type": "low_rank", "rank": 4}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"methods": {"a": method(type="AdamW", params=3)}}, 'method "a": optimizer.params must be an object, not 3'),
        ({"methods": {"a": {**method(), "megalr": 3}}}, 'method "a": megalr must be an object, not 3'),
        ({"base": {"optimizer": 3}}, "the base's optimizer must be an object, not 3"),
        ({"base": {"optimizer": {"params": [3]}}}, '"optimizer.params" must be an object like'),
        ({"base": {"megalr": "x"}}, '"megalr" must be an object like {...}, not "x"'),
        ({"base": {"zero_optimization": {"stage": 7}}}, "stage is 7: write a whole number from 0 to 3"),
        ({"base": {"zero_optimization": 3}}, '"zero_optimization" must be an object'),
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
