"""The unigram baseline against a hand computation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megalr.data import unigram_perplexity


def test_unigram_perplexity_by_hand() -> None:
    # add-one: probabilities 4/8, 2/8, 1/8, 1/8; the evaluation text has two of the first, one of the last
    value = unigram_perplexity(np.array([3, 1, 0, 0]), np.array([2, 0, 0, 1]))
    assert value == pytest.approx(math.exp((2 * math.log(2) + math.log(8)) / 3), rel=1e-12)


def test_a_uniform_text_has_the_perplexity_of_its_vocabulary() -> None:
    assert unigram_perplexity(np.zeros(10, dtype=np.int64), np.arange(10)) == pytest.approx(10)


def test_nothing_to_score_is_an_error() -> None:
    with pytest.raises(ValueError, match="no token"):
        unigram_perplexity(np.ones(3, dtype=np.int64), np.zeros(3, dtype=np.int64))
    with pytest.raises(ValueError, match="3 and 4"):
        unigram_perplexity(np.ones(3, dtype=np.int64), np.ones(4, dtype=np.int64))
