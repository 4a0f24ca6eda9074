"""Every parametrization under every way of cutting what it trains, against one plain process, and going on from a save.

A case of which there is no second implementation is compared with one process of ours.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from tests.covering import daily_and_slow
from tests.equality import ACCUMULATIONS, STAGES, WORLDS, Case, assert_equal
from tests.references.parametrizations import CASES, SETTINGS
from tests.world.training import WAYS, Way, alone, train


@functools.cache
def expected(case: Case) -> dict[str, Tensor]:
    return alone(case) if case.plain is None else case.expected


def check(case: Case, stage: int, size: int, accumulation: int = 1, resume: Way | None = None) -> None:
    ranks = train(case, stage, size, accumulation, resume=resume)
    assert_equal(ranks[0].weights, expected(case), case.bound)
    for rank in ranks:
        assert rank.lost == []
        assert all(torch.equal(rank.weights[name], w) for name, w in ranks[0].weights.items())
        assert (rank.updates, rank.refreshes) == (case.updates, ranks[0].refreshes)


@pytest.mark.parametrize(
    ("title", "stage", "size", "accumulation", "resume"),
    daily_and_slow(list(CASES), STAGES, WORLDS, ACCUMULATIONS, WAYS),
)
def test_equals_one_plain_process_and_resumes_bitwise(title, stage, size, accumulation, resume):
    check(CASES[title], stage, size, accumulation, resume)


@pytest.mark.parametrize(("title", "stage", "size"), daily_and_slow(list(SETTINGS), STAGES, WORLDS))
def test_settings_equal_one_plain_process(title, stage, size):
    check(SETTINGS[title], stage, size)
