"""The page on maturity: its levels follow from evidence that is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from megalr import maturity
from megalr.layers.registry import PARAMETRIZATIONS
from megalr.layers.tensor_parallel.cutting import types_that_are_cut
from megalr.rules.registry import RULES
from tests.references import REFERENCES
from tests.references.parametrizations import CASES

ROOT = Path(__file__).parents[2]


def test_the_page_is_what_the_tables_say():
    written = (ROOT / "docs" / "maturity.md").read_text(encoding="utf-8")
    assert written == maturity.page() + "\n", "run: python -m megalr.maturity > docs/maturity.md"


def test_every_method_is_on_the_page_and_has_a_second_implementation():
    rows = re.findall(r"^\| `(\w+)` \|", maturity.page(), re.M)
    assert {*RULES, *PARAMETRIZATIONS} - {"full"} <= set(rows)
    assert set(RULES) <= set(REFERENCES)
    kinds = {case.megalr.get("parametrization", {}).get("type") for case in CASES.values()}
    assert set(PARAMETRIZATIONS) - {"full"} <= kinds


def test_what_counts_as_trained_is_in_the_benchmarks_recipe():
    recipe = yaml.safe_load((ROOT / "launchers/recipes/paper_tiny.yaml").read_text(encoding="utf-8"))
    methods = recipe["methods"].values()
    types = {method["optimizer"]["type"] for method in methods}
    types |= {method.get("megalr", {}).get("parametrization", {}).get("type") for method in methods}
    assert types >= maturity.TRAINED


@pytest.mark.parametrize("feature", maturity.FEATURES, ids=lambda feature: feature.name)
def test_the_tests_that_a_feature_names_are_there(feature):
    for path, _, name in (test.partition("::") for test in feature.tests):
        assert f"def {name or 'test_'}" in (ROOT / "tests" / path).read_text(encoding="utf-8"), path
    assert feature.tests or feature.level == "experimental"


def test_a_level_follows_from_the_evidence():
    assert maturity.level_of("Muon", cut=True) == "stable"
    assert maturity.level_of("lora", cut=False) == "beta"  # trained, not under tensor parallelism
    assert maturity.level_of("CAME", cut=True) == "beta"  # not trained
    assert "projected" in types_that_are_cut()


def test_nothing_claims_a_gpu():
    rows = [line.split(" | ") for line in maturity.page().splitlines() if line.startswith("| ") and "GPU |" not in line]
    assert len(rows) > 60
    assert [row for row in rows if "---" not in row[1] and not row[-1].startswith("not run")] == []
