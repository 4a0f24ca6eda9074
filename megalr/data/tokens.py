"""Text is tokenized once, into a memory-mapped cache that exists whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from megalr.data.documents import NO_TEXT, Piece
from megalr.data.sources import LocalText, Source
from megalr.data.tokenizer import largest_token, unused_marks
from megalr.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

_FORMAT = 2  # raise it when the files or the way of tokenizing change
_BATCH_PIECES, _BATCH_CHARACTERS = 4096, 1 << 21
_ABANDONED_SECONDS = 24 * 3600
_LARGEST = np.iinfo(np.int32).max  # of the examples' dtype
_VERIFIED_BYTES = 1 << 26  # up to which a text's hash is looked at whenever it is loaded
_CHECKED_CHARACTERS = 16  # for each token that is to be read; a token of a language has four or five
_ENDS_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class TokenStore:
    """The tokens of a text, memory-mapped.

    Attributes:
        tokens: (tokens,) uint16 or uint32; each document is followed by the end-of-text token.
        ends: (documents,) int64; where each document, its end-of-text token included, ends in ``tokens``.
        digest: hash of both, the text's identity as far as training is concerned.
        without_text: documents that were left out because there is no text in them.
        seconds: how long tokenizing took.
        folder: where they lie.
    """

    tokens: NDArray[Any]
    ends: NDArray[np.int64]
    digest: str
    without_text: int
    seconds: float
    folder: Path


class TokenCache:
    """The place of one text's tokens, by one tokenizer, up to one number of tokens.

    The place follows from what is read and how, so that a changed file, tokenizer or limit is another place.
    Files are written into a folder of another name, which is renamed when all are complete: whoever finds the
    folder finds all of it, also when processes race or are killed.

    Attributes:
        folder: the place.
        stream: the text itself, whatever its limit: by one tokenizer, equal ones have equal tokens in equal places.
    """

    def __init__(self, source: Source, tokenizer: PreTrainedTokenizerFast, root: Path, limit: int | None) -> None:
        self._source = source
        self._tokenizer = tokenizer
        self._limit = limit
        self._largest = largest_token(tokenizer)
        if self._largest > _LARGEST:
            raise UserError(
                f"the tokenizer has the token id {self._largest:,}; ids up to {_LARGEST:,} can be trained on"
            )
        identity = source.identity()
        self.stream = json.dumps(identity, sort_keys=True)
        key = [
            _FORMAT,
            identity,
            tokenizer.backend_tokenizer.to_str(),
            tokenizer.eos_token_id,
            limit,
        ]
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        words = re.sub(r"[^\w.-]+", "-", Path(source.label).name)[-40:].strip("-.")
        self.folder = root / f"{words}-{digest[:20]}"

    def load(self) -> TokenStore | None:
        """The tokens if they are there and whole, else None."""
        try:
            return _read_store(self.folder)
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def write(self) -> None:
        """Tokenizes the text and puts the result in place; harmless where another process does the same.

        Raises:
            UserError: the text cannot be read, or the folder cannot be written.
        """
        root = self.folder.parent
        partial = root / f".partial-{self.folder.name}-{uuid.uuid4().hex[:8]}"
        self._check_files()
        pieces = self._source.pieces()
        try:
            partial.mkdir(parents=True)
            _remove_abandoned(root)
            self._write_files(partial, pieces)
            self._check_unchanged()
            if self.folder.exists() and self.load() is None:
                shutil.rmtree(self.folder)  # damaged
            if not self.folder.exists():
                partial.rename(self.folder)
        except OSError as error:
            if self.load() is None:  # else another process was faster
                raise UserError(
                    f"cannot write tokens to {root}: {error}; name another folder with the environment "
                    "variable MEGALR_CACHE"
                ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _check_files(self) -> None:
        """Read the files once, because a mistake in the last line would end the tokenizing, which takes far longer."""
        if not isinstance(self._source, LocalText):
            return
        characters = 0
        for piece in self._source.pieces():
            characters += len(piece.text)
            if self._limit is not None and characters > self._limit * _CHECKED_CHARACTERS:
                return

    def _check_unchanged(self) -> None:
        """Refuse tokens of another text than the one whose hash is in the folder's name."""
        if isinstance(self._source, LocalText) and json.dumps(self._source.identity(), sort_keys=True) != self.stream:
            raise UserError(f"{self._source.label} was changed while it was tokenized: start again when it is complete")

    def _write_files(self, folder: Path, pieces: Iterator[Piece]) -> None:
        from tqdm import tqdm

        started = time.perf_counter()
        dtype = np.dtype(np.uint16 if self._largest < 1 << 16 else np.uint32)
        hashes = (hashlib.sha256(), hashlib.sha256())
        tokens = documents = without_text = 0
        with (
            (folder / "tokens.bin").open("wb") as token_file,
            (folder / "ends.bin").open("wb") as end_file,
            tqdm(
                desc=f"tokenizing {self._source.label}",
                unit=" tokens",
                unit_scale=True,
                delay=3,
                disable=None,
            ) as bar,
        ):
            for ids, ends, empty in self._chunks(pieces):
                for array, file, content in zip(
                    (ids.astype(dtype), ends + tokens), (token_file, end_file), hashes, strict=True
                ):
                    file.write(array.tobytes())
                    content.update(array.tobytes())
                tokens, documents, without_text = tokens + len(ids), documents + len(ends), without_text + empty
                bar.update(len(ids))
            for file in (token_file, end_file):
                file.flush()
                os.fsync(file.fileno())
        meta = {
            "text": self._source.label,
            "dtype": dtype.name,
            "tokens": tokens,
            "documents": documents,
            "without_text": without_text,
            "digest": _joined(hashes),
            "seconds": time.perf_counter() - started,
        }
        (folder / "meta.json").write_text(json.dumps(meta, indent=1))

    def _chunks(self, pieces: Iterator[Piece]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], int]]:
        """Runs of tokens, the document ends inside each counted from its start, and how many documents had no text."""
        encoder = self._encoder()
        marks, unknown = sorted(unused_marks(self._tokenizer)), self._tokenizer.unk_token_id
        left = self._limit
        while read := _take(pieces):
            batch = [piece for piece in read if piece is not NO_TEXT]
            ids: list[int] = []
            ends: list[int] = []
            encoded = encoder.encode_batch_fast([piece.text for piece in batch], add_special_tokens=False)
            for piece, encoding in zip(batch, encoded, strict=True):
                ids.extend(encoding.ids)
                if piece.ends_document:
                    ids.append(self._tokenizer.eos_token_id)
                    ends.append(len(ids))
            if left is not None and len(ids) >= left:
                ids = ids[:left]
                ends = [end for end in ends if end < left] + [left]
            array = np.array(ids, dtype=np.int64)
            if marks and unknown is not None:  # the name of such a token, which some vocabularies have as a word, too
                array[np.isin(array, marks)] = unknown
            if array.max(initial=0) > self._largest:
                raise UserError(
                    f"the tokenizer turns {self._source.label} into the token id {array.max():,}, but the largest of "
                    f"its vocabulary is {self._largest:,}: mend its tokenizer.json"
                )
            yield array, np.array(ends, dtype=np.int64), len(read) - len(batch)
            if left is not None:
                left -= len(ids)
                if left == 0:
                    return

    def _encoder(self) -> Tokenizer:
        """A copy without truncation and padding, to which a special token's name in a text is just text."""
        from tokenizers import Tokenizer

        encoder = Tokenizer.from_str(self._tokenizer.backend_tokenizer.to_str())
        encoder.no_truncation()
        encoder.no_padding()
        encoder.encode_special_tokens = True
        return encoder


def _take(pieces: Iterator[Piece]) -> list[Piece]:
    """As many pieces as are worth encoding at once in bounded memory; none at the end."""
    batch: list[Piece] = []
    characters = 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece.text)
        if characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_PIECES:
            break
    return batch


def _read_store(folder: Path) -> TokenStore:
    """What is in a folder; any error of reading, parsing or comparing where it is not what was written."""
    meta = json.loads((folder / "meta.json").read_bytes())
    if meta["dtype"] not in ("uint16", "uint32"):
        raise ValueError(f"tokens of dtype {meta['dtype']}")
    for key, kind in (("tokens", int), ("documents", int), ("without_text", int), ("digest", str), ("seconds", float)):
        if type(meta[key]) is not kind:
            raise ValueError(f"{key} is {meta[key]}")
    tokens = _map(folder / "tokens.bin", meta["dtype"], meta["tokens"])
    ends = _map(folder / "ends.bin", "int64", meta["documents"])
    _check_ends(ends, len(tokens))
    if tokens.nbytes + ends.nbytes <= _VERIFIED_BYTES:
        digest = _joined((hashlib.sha256(tokens.tobytes()), hashlib.sha256(ends.tobytes())))
        if digest != meta["digest"]:
            raise ValueError(f"the digest is {digest}, expected {meta['digest']}")
    return TokenStore(tokens, ends, meta["digest"], meta["without_text"], meta["seconds"], folder)


def _check_ends(ends: NDArray[np.int64], tokens: int) -> None:
    """Every document has a token, and the last one ends where the tokens do."""
    last = 0
    for start in range(0, len(ends), _ENDS_AT_ONCE):
        part = ends[start : start + _ENDS_AT_ONCE]
        if part[0] <= last or (part[1:] <= part[:-1]).any():
            raise ValueError("documents overlap")
        last = int(part[-1])
    if last != tokens:
        raise ValueError(f"documents end at token {last} of {tokens}")


def _joined(hashes: tuple[Any, ...]) -> str:
    return hashlib.sha256(b"".join(content.digest() for content in hashes)).hexdigest()


def _map(path: Path, dtype: str, count: int) -> NDArray[Any]:
    size = np.dtype(dtype).itemsize * count
    if path.stat().st_size != size:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, expected {size}")
    return np.memmap(path, dtype=dtype, mode="r") if count else np.zeros(0, dtype=dtype)


def _remove_abandoned(root: Path) -> None:
    """Deletes what killed processes left, once nobody can still be writing it."""
    for partial in root.glob(".partial-*"):
        with contextlib.suppress(OSError):  # another process may be deleting it too
            newest = max(path.stat().st_mtime for path in (partial, *partial.iterdir()))
            if time.time() - newest > _ABANDONED_SECONDS:
                shutil.rmtree(partial, ignore_errors=True)
