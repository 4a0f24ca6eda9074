"""The soak itself: outcomes are told apart, and a few inputs of most kinds are answered as they should be."""

import pytest

from tests.soak.__main__ import chosen, soak
from tests.soak.kinds import KINDS
from tests.soak.trial import FINE, Case, attempt, judged

ERROR = "error: gradient_clipping is -1: write a number of at least 0"
OF_EACH_KIND = 7
QUICK = (  # refused at once
    "JSON: values",
    "JSON: names",
    "JSON: files",
    "model shapes",
    "flags",
    "environment",
    "texts",
    "tokenizers",
    "folders of runs",
    "calls",
)


def case(**changes):
    return Case(**{"about": "", "words": (), "names": ("gradient_clipping",), **changes})


@pytest.mark.parametrize(
    ("given", "code", "output", "outcome"),
    [
        (case(), 2, ERROR, "refused clearly"),
        (case(names=("--steps", "Gradient")), 2, ERROR, "refused clearly"),
        (case(names=("--steps",)), 2, ERROR, "unclear"),
        (case(), 2, "gradient_clipping is wrong", "unclear"),
        (case(expect="good"), 2, ERROR, "unclear"),
        (case(), 0, "", "silently wrong"),
        (case(expect="good"), 0, "", "rightly accepted"),
        (case(expect="either"), 0, "", "rightly accepted"),
        (case(expect="either", says=("step2",)), 0, "passed over: step2 is damaged", "rightly accepted"),
        (case(expect="either", says=("step2",)), 0, "passed over: step1 is damaged", "silently wrong"),
        (case(), 1, ERROR, "traceback"),
        (case(), -11, "", "traceback"),
        (case(expect="either"), 2, f"Traceback (most recent call last)\n{ERROR}", "traceback"),
        (case(damage_code=1), 1, "a file is damaged", "refused clearly"),
    ],
)
def test_an_answer_has_one_word(given, code, output, outcome):
    assert judged(given, code, output) == outcome


@pytest.mark.parametrize(
    ("program", "outcome"),
    [
        ("import time; time.sleep(60)", "hang"),
        ("import os; os.remove('text.txt')", "lost"),
        ("open('text.txt', 'a').write('more')", "lost"),
        ("open('new.txt', 'w').write('more')", "silently wrong"),
    ],
)
def test_files_and_time_are_watched(tmp_path, program, outcome):
    for name in ("small.json", "text.txt", "good.json"):
        (tmp_path / name).write_text("{}")
    tried = attempt("a kind", case(words=("-c", program)), tmp_path, tmp_path / "trial", limit=0.5)
    assert tried.outcome == outcome
    assert not (tmp_path / "trial").exists()


def test_inputs_are_the_same_for_the_same_seed():
    first, again, other = (chosen(KINDS, seed, 3) for seed in (1, 1, 2))
    assert [(kind, case.about) for kind, case in first] == [(kind, case.about) for kind, case in again]
    assert [case.about for _, case in first] != [case.about for _, case in other]
    assert {kind for kind, _ in first} == {kind.name for kind in KINDS}


def test_no_kind_is_forgotten_and_there_are_thousands():
    assert len(chosen(KINDS, 0, None)) > 2000


def test_a_few_inputs():
    quick = [(kind, case) for kind, case in chosen(KINDS, 0, 30) if case.expect == "bad" and not case.needs]
    cases = [each for name in QUICK for each in [one for one in quick if one[0] == name][:OF_EACH_KIND]]
    assert len(cases) > 40
    bad = [tried for tried in soak(cases) if tried.outcome not in FINE]
    assert [(tried.outcome, tried.kind, tried.case.about) for tried in bad] == []
