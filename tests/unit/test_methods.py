"""The page of all methods comes from their docstrings, which say what there is to say."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from megalr import methods
from megalr.layers.low_rank import LowRankConfig
from megalr.layers.registry import PARAMETRIZATIONS
from megalr.rules.muon import Muon
from megalr.rules.registry import RULES

ROOT = Path(__file__).parents[2]


def test_the_page_is_what_the_docstrings_say():
    written = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert written == methods.page() + "\n", "run: python -m megalr.methods > docs/methods.md"


def test_the_front_page_leads_there_instead_of_listing_methods():
    front = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "(docs/methods.md)" in front
    tables = [line for line in front.splitlines() if line.startswith("| `")]
    assert not [line for line in tables if line.split("`")[1] in {*RULES, *PARAMETRIZATIONS}]


def test_a_module_of_its_own_for_each_method():
    every = [m for m in (*RULES.values(), *PARAMETRIZATIONS.values()) if m and m.__module__.startswith("megalr.")]
    assert len({method.__module__ for method in every}) == len(every)


def test_lines_links_and_meanings():
    assert methods.summary(Muon) == (
        "Muon: momentum, made orthogonal",
        "[page](https://kellerjordan.github.io/posts/muon/), [2502.16982](https://arxiv.org/abs/2502.16982)",
    )
    loro = methods.summary(PARAMETRIZATIONS["loro"])
    assert loro[0].endswith("of rank r") and loro[1] == "[openreview](https://openreview.net/forum?id=i0zzO7Hslk)"
    said = methods.meanings(LowRankConfig)
    assert said["alpha"].startswith("numerator of the fixed scale") and said["alpha"].endswith("a scale of one.")
    assert said["rank"].startswith("r, the inner dimension") and "is the published code's start" in said["init"]


def test_a_docstring_that_says_too_little_is_named(monkeypatch):
    @dataclass(frozen=True, kw_only=True)
    class Undocumented(Muon):
        """Muon with one more key."""

        sharpness: float = 1.0

    Undocumented.__module__ = "megalr.rules.muon"
    monkeypatch.setitem(RULES, "Undocumented", Undocumented)
    with pytest.raises(ValueError, match='Undocumented does not say .* what its key "sharpness" means'):
        methods.page()
    Undocumented.__module__ = "megalr.rules.checks"
    with pytest.raises(ValueError, match='has to begin with "Name: what it is, arXiv'):
        methods.page()
