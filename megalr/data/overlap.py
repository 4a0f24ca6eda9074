"""How much of a text that a model is judged by it was trained on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megalr.data.sources import Source, files_in_both

_COMPARED_BYTES = 1 << 30  # of training tokens, which are read once; above, documents are not compared
_SAME_TOKENS = 16  # in which a document that was cut off has to agree with another


@dataclass(frozen=True)
class Span:
    """Where in a text a part of it lies.

    Attributes:
        source: the text.
        stream: what equals another text's if both have the same tokens in the same places.
        tokens: (tokens,) of the whole text, as far as it was read.
        ends: (documents,) int64; where its documents end.
        start, stop: the part's first token, and the one after its last.
    """

    source: Source
    stream: str
    tokens: NDArray[Any]
    ends: NDArray[np.int64]
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def tokens_trained_on(training: Span, judged: Span) -> int:
    """How many tokens of ``judged`` were trained on: by their place in one text, or in files that both texts have.

    Equal documents in different files do not count; :func:`repeated` finds those.

    Raises:
        UserError: a file that cannot be read.
    """
    if judged.stream == training.stream:
        return max(0, min(judged.stop, training.stop) - max(judged.start, training.start))
    return _in_equal_documents(training, judged) if files_in_both(judged.source, training.source) else 0


def repeated(training: Span, judged: Span) -> str:
    """A warning where documents of ``judged`` are in the training text, too; "" if none is, or it is too large to look.

    More than 1 GiB of training tokens are not searched.
    """
    if training.tokens.itemsize * len(training) > _COMPARED_BYTES:
        return ""
    found = _in_equal_documents(training, judged)
    if not found:
        return ""
    return (
        f"WARNING: {found:,} of the {len(judged):,} held-out tokens are in documents that are in the training text, "
        "too. The perplexity is too low: take the copies out of one of the texts"
    )


def _in_equal_documents(training: Span, judged: Span) -> int:
    """Tokens of ``judged`` in documents that begin in ``training`` as they do here, as far as these were trained on."""
    first = int(np.searchsorted(judged.ends, judged.start, side="right"))
    after = int(np.searchsorted(judged.ends, judged.stop, side="left")) + 1
    mine = _bounds(judged.ends, len(judged.tokens))[first:after]
    theirs = _bounds(training.ends, training.stop)
    equal = _equal(judged.tokens, mine, training.tokens, theirs)
    reach = np.where(equal, mine[:, 1] - mine[:, 0], 0)  # (documents,) tokens of each from its start
    # A limit cuts a text's last document, and what is held out of a single one cuts that.
    for i in range(len(mine)):
        reach[i] = max(reach[i], _agree(judged.tokens, mine[i], training.tokens, theirs[-1]))
    if after >= len(judged.ends) and not equal[-1]:
        begin = theirs[training.tokens[theirs[:, 0]] == judged.tokens[mine[-1, 0]]]
        reach[-1] = max([reach[-1], *(_agree(judged.tokens, mine[-1], training.tokens, each) for each in begin)])
    counted = np.minimum(mine[:, 0] + reach, judged.stop) - np.maximum(mine[:, 0], judged.start)
    return int(np.maximum(counted, 0).sum())


def _bounds(ends: NDArray[np.int64], stop: int) -> NDArray[np.int64]:
    """(documents, 2) int64: start and end of each document that begins before ``stop``, where the last may be cut."""
    inner = np.asarray(ends[: int(np.searchsorted(ends, stop, side="left"))])
    bounds = np.append(inner, stop)
    return np.stack([np.concatenate([[0], bounds[:-1]]), bounds], axis=1)


def _equal(
    tokens: NDArray[Any], mine: NDArray[np.int64], others: NDArray[Any], theirs: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Which documents are token for token among the others; (documents,) bool."""
    marks = np.unique(_mark(tokens, mine))
    known = set(_hashes(others, theirs[np.isin(_mark(others, theirs), marks)]))
    return np.array([each in known for each in _hashes(tokens, mine)], dtype=bool)


def _mark(tokens: NDArray[Any], bounds: NDArray[np.int64]) -> NDArray[np.int64]:
    """A number by which most documents differ: of length, first, middle and last token but one; (documents,) int64."""
    starts, stops = bounds[:, 0], bounds[:, 1]
    places = (starts, (starts + stops) // 2, np.maximum(stops - 2, starts))
    mark = stops - starts
    for place in places:
        mark = mark * 1_000_003 + tokens[place].astype(np.int64)
    return mark


def _hashes(tokens: NDArray[Any], bounds: NDArray[np.int64]) -> list[bytes]:
    return [hashlib.sha256(tokens[start:stop].astype(np.uint32).tobytes()).digest() for start, stop in bounds]


def _agree(tokens: NDArray[Any], mine: NDArray[np.int64], others: NDArray[Any], theirs: NDArray[np.int64]) -> int:
    """In how many tokens, from their starts, two documents agree if one goes on as the other does; else 0."""
    length = int(min(mine[1] - mine[0], theirs[1] - theirs[0]))
    one, other = tokens[mine[0] : mine[0] + length], others[theirs[0] : theirs[0] + length]
    return length if length >= _SAME_TOKENS and one[0] == other[0] and np.array_equal(one, other) else 0
