"""The simplest model that a language model has to beat."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def unigram_perplexity(train_counts: NDArray[np.int64], eval_counts: NDArray[np.int64]) -> float:
    """Perplexity, on the evaluation text, of the training text's token frequencies.

    Args:
        train_counts: (vocabulary,) how often each token is to be predicted in training, see
            ``Examples.token_counts``.
        eval_counts: (vocabulary,) the same of the evaluation text.

    One is added to each training count, so that a token that training never saw is improbable, not
    impossible.

    Raises:
        ValueError: counts of different vocabularies, or nothing to score.
    """
    if train_counts.shape != eval_counts.shape:
        raise ValueError(f"counts of vocabularies of {len(train_counts)} and {len(eval_counts)} entries")
    scored = eval_counts.sum()
    if scored == 0:
        raise ValueError("the evaluation text has no token to score")
    smoothed = train_counts + 1.0
    log_probabilities = np.log(smoothed / smoothed.sum())
    return float(np.exp(-(eval_counts * log_probabilities).sum() / scored))
