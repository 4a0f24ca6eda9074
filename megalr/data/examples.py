"""Examples of one length, cut out of memory-mapped tokens when they are asked for."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megalr.errors import UserError

_COUNTED_AT_ONCE = 4096
_ENDS_AT_ONCE = 1 << 20


class Examples(ABC):
    """A table of ``len()`` examples of ``sequence_length`` tokens.

    Attributes:
        sequence_length: L, tokens of an example, pads included.
        fingerprint: hash of everything that decides the examples' content.
        tokens: tokens in all examples, pads not counted.
        predicted: how many of them are to be predicted, all but each example's first.
        dropped: tokens of the text that are in no example.
    """

    def __init__(self, sequence_length: int, pad_id: int, fingerprint: str, tokens: int, dropped: int) -> None:
        self.sequence_length = sequence_length
        self.pad_id = pad_id
        self.fingerprint = hashlib.sha256(fingerprint.encode()).hexdigest()
        self.tokens = tokens
        self.dropped = dropped

    @property
    def predicted(self) -> int:
        """See the class."""
        return self.tokens - len(self)

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def _content(self, index: int) -> NDArray[Any]:
        """The example's tokens without pads, (1 .. L,)."""

    def __getitem__(self, index: int) -> tuple[NDArray[np.int32], int]:
        """The example's tokens, (L,) int32, and how many of them, from the start, are not pads."""
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        content = self._content(index)
        row = np.full(self.sequence_length, self.pad_id, dtype=np.int32)
        row[: len(content)] = content
        return row, len(content)

    def __iter__(self) -> Iterator[tuple[NDArray[np.int32], int]]:
        return (self[index] for index in range(len(self)))

    def token_counts(self, vocabulary: int) -> NDArray[np.int64]:
        """How often each token id is to be predicted: all but each example's first. (vocabulary,) int64.

        The sum is the number of tokens that an evaluation of these examples scores.

        Raises:
            UserError: a token id outside the vocabulary.
        """
        counts = np.zeros(vocabulary, dtype=np.int64)
        for start in range(0, len(self), _COUNTED_AT_ONCE):
            stop = min(start + _COUNTED_AT_ONCE, len(self))
            targets = np.concatenate([self._content(index)[1:] for index in range(start, stop)])
            if targets.max(initial=0) >= vocabulary:
                raise UserError(
                    f"the text holds the token id {targets.max():,}, but the model's vocabulary has {vocabulary:,} "
                    "entries: write a larger vocab_size in the model's JSON, or choose another tokenizer. If the "
                    "tokenizer has no such id, the cache of tokens is damaged: delete it"
                )
            counts += np.bincount(targets, minlength=vocabulary)
        return counts


class PackedExamples(Examples):
    """Documents joined by their end-of-text tokens and cut into full sequences, whatever lies across a cut.

    The tail that fills no sequence is dropped, or with ``keep_tail`` becomes a last, padded example.
    """

    def __init__(
        self, tokens: NDArray[Any], sequence_length: int, *, pad_id: int, fingerprint: str, keep_tail: bool
    ) -> None:
        full, tail = divmod(len(tokens), sequence_length)
        self._count = full + (keep_tail and tail >= 2)  # one token alone has nothing to predict
        kept = min(len(tokens), self._count * sequence_length)
        name = f"packed {sequence_length} {keep_tail} {fingerprint}"
        super().__init__(sequence_length, pad_id, name, tokens=kept, dropped=len(tokens) - kept)
        self._text = tokens

    def __len__(self) -> int:
        return self._count

    def _content(self, index: int) -> NDArray[Any]:
        return self._text[index * self.sequence_length : (index + 1) * self.sequence_length]


class TruncatedExamples(Examples):
    """One example a document: its first tokens, then end-of-text, then pads.

    A document that is too long loses its end but not its end-of-text token, as in the paper's setting, where
    the tokenizer truncates to make room for it.
    """

    def __init__(
        self,
        tokens: NDArray[Any],
        ends: NDArray[np.int64],
        sequence_length: int,
        *,
        pad_id: int,
        end_id: int,
        fingerprint: str,
    ) -> None:
        kept = 0
        for start in range(0, len(ends), _ENDS_AT_ONCE):
            lengths = np.diff(ends[start : start + _ENDS_AT_ONCE], prepend=ends[start - 1] if start else 0)
            kept += int(np.minimum(lengths, sequence_length).sum())
        name = f"truncated {sequence_length} {fingerprint}"
        super().__init__(sequence_length, pad_id, name, tokens=kept, dropped=len(tokens) - kept)
        self._text = tokens
        self._ends = ends
        self._end_id = end_id

    def __len__(self) -> int:
        return len(self._ends)

    def _content(self, index: int) -> NDArray[Any]:
        start = int(self._ends[index - 1]) if index else 0
        stop = int(self._ends[index])
        if stop - start <= self.sequence_length:
            return self._text[start:stop]
        content = np.array(self._text[start : start + self.sequence_length])
        content[-1] = self._end_id
        return content


class SampledExamples(Examples):
    """Some examples of a table, evenly spread over it."""

    def __init__(self, whole: Examples, count: int) -> None:
        """
        Args:
            whole: the table.
            count: how many to take, at most all.
        """
        self._whole = whole
        self._indices = [index * len(whole) // count for index in range(count)]
        tokens = sum(len(whole._content(index)) for index in self._indices)
        super().__init__(whole.sequence_length, whole.pad_id, f"sample {count} {whole.fingerprint}", tokens, dropped=0)

    def __len__(self) -> int:
        return len(self._indices)

    def _content(self, index: int) -> NDArray[Any]:
        return self._whole._content(self._indices[index])
