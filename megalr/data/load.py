"""From a ``DataConfig`` to training and evaluation examples."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from megalr.data.config import DataConfig
from megalr.data.examples import Examples, PackedExamples, TruncatedExamples
from megalr.data.hub import HubText
from megalr.data.overlap import Span
from megalr.data.sources import LocalText, evaluation_source, training_source
from megalr.data.tokens import TokenCache, TokenStore
from megalr.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_HUB_TRAIN_TOKENS = 100_000_000
_HUB_EVAL_TOKENS = 10_000_000


@dataclass(frozen=True)
class Data:
    """What a run trains on and is judged by.

    Attributes:
        train, evaluation, test: the examples; no test without ``test_half``.
        description: what was read, for the reader, a line for each text.
        spans: where the training text lies, and the held-out one, a test's half included.
        limit: how many tokens of the training text were read where it has, or may have, more; None for all.
    """

    train: Examples
    evaluation: Examples
    test: Examples | None
    description: str
    spans: tuple[Span, Span]
    limit: int | None = None


def load_data(
    config: DataConfig, tokenizer: PreTrainedTokenizerFast, *, rank: int, barrier: Callable[[], None]
) -> Data:
    """The examples of a run; collective, to be called by every process.

    Rank 0 tokenizes what the cache does not hold yet, the others wait and map the same files.

    Where the held-out text is not a text of its own, it is the end of the training text and taken out of it:
    the last ``eval_fraction`` of the documents if there is more than one, of the tokens if there is one. A
    .txt file is one document, so is a line of JSONL and a row of Parquet or of a hub dataset. No token is in
    both parts, and none in neither, except what is shorter than a sequence at the end of the packed training
    text, and what truncation cuts off (``Examples.dropped``).

    Args:
        config: what to read and how to cut it.
        tokenizer: what ``load_tokenizer`` gives.
        rank: this process's rank *on its node* where nodes have caches of their own, else its global rank.
        barrier: waits for all processes; called once, also when this process fails, so that none waits for
            ever.

    Raises:
        UserError: no text, too little of it, or text that cannot be read.
    """
    try:
        train_text, held_text = training_source(config), evaluation_source(config)
        from_hub = isinstance(train_text, HubText)
        limit = config.max_train_tokens or (_HUB_TRAIN_TOKENS if from_hub else None)
        held_limit = config.max_eval_tokens or (
            _HUB_EVAL_TOKENS if isinstance(held_text, HubText) or (held_text is None and from_hub) else None
        )
        cache = TokenCache(train_text, tokenizer, config.cache_folder, limit)
        held_cache = (
            TokenCache(held_text, tokenizer, config.cache_folder, held_limit) if held_text is not None else None
        )
        origins = [_prepare(each, rank) for each in (cache, held_cache) if each is not None]
    except Exception:
        barrier()
        raise
    barrier()

    store = _stored(cache)
    if len(store.ends) == 0:
        raise UserError(f"{train_text.label} holds no text to train on")
    span = partial(Span, train_text, cache.stream, store.tokens, store.ends)
    held_store = _stored(held_cache) if held_cache is not None else None
    if held_text is not None and held_store is not None and len(held_store.ends) > 0:
        assert held_cache is not None
        train, held = _whole(store, train_text.label), _whole(held_store, held_text.label)
        held_span = Span(held_text, held_cache.stream, held_store.tokens, held_store.ends, 0, len(held.tokens))
        spans = span(0, len(train.tokens)), held_span
    elif held_text is None or config.eval_dataset is None:
        train, held = _split(store, train_text.label, config.eval_fraction, held_limit)
        spans = span(0, len(train.tokens)), span(len(train.tokens), len(store.tokens))
    else:
        raise UserError(
            f"the held-out text ({held_text.label}) is empty; name another, or none to hold back the end of the "
            "training text"
        )
    data = _data(config, tokenizer, train, held, origins, spans)
    left_out = dict.fromkeys(text.left_out for text in (train_text, held_text) if isinstance(text, LocalText))
    description = "\n".join([data.description, *filter(None, left_out)])
    return replace(data, description=description, limit=limit if len(store.tokens) == limit else None)


@dataclass(frozen=True)
class _Part:
    """Part of a text: (tokens,) and, counted from its start, (documents,) where its documents end."""

    tokens: NDArray[Any]
    ends: NDArray[np.int64]
    identity: str
    label: str
    without_text: int = 0  # documents of the whole text


def _prepare(cache: TokenCache, rank: int) -> str:
    """Makes sure, on rank 0, that the cache is filled; says where it came from."""
    store = cache.load()
    if store is not None:
        return f"reused the cache {store.folder}"
    if rank != 0:
        return ""
    cache.write()
    store = _stored(cache)
    return f"tokenized in {store.seconds:.1f} s into {store.folder}"


def _stored(cache: TokenCache) -> TokenStore:
    store = cache.load()
    if store is None:
        raise UserError("the first process could not prepare the text; its own message says why")
    return store


def _whole(store: TokenStore, label: str) -> _Part:
    return _Part(store.tokens, store.ends, store.digest, label, store.without_text)


def _split(store: TokenStore, label: str, fraction: float, limit: int | None) -> tuple[_Part, _Part]:
    """Training and held-out part of one text; the latter has at most ``limit`` tokens, or one document."""
    total, documents = len(store.tokens), len(store.ends)
    earliest = max(0, total - limit) if limit is not None else 0
    if documents > 1:
        first = documents - max(1, round(fraction * documents))
        if earliest > 0:  # the first document that starts there or later
            first = max(first, int(np.searchsorted(store.ends, earliest)) + 1)
        first = min(max(first, 1), documents - 1)
        cut = int(store.ends[first - 1])
        train_ends, held_ends = store.ends[:first], store.ends[first:] - cut
        words = f"the last {_count(documents - first, 'document')} of {label}"
    else:
        cut = max(total - max(1, round(fraction * total)), earliest)
        train_ends, held_ends = np.array([cut]), np.array([total - cut])
        words = f"the last {_count(total - cut, 'token')} of {label}"
    return (
        _Part(store.tokens[:cut], train_ends, f"{store.digest} to {cut}", label, store.without_text),
        _Part(store.tokens[cut:], held_ends, f"{store.digest} from {cut}", words),
    )


def _data(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerFast,
    train: _Part,
    held: _Part,
    origins: list[str],
    spans: tuple[Span, Span],
) -> Data:
    if len(train.tokens) < config.sequence_length:
        raise UserError(
            f"sequence_length is {config.sequence_length}, but the training text ({train.label}) has only "
            f"{len(train.tokens)} tokens; choose a shorter sequence or a longer text"
        )
    if len(held.tokens) < 2:
        raise UserError(
            f"the held-out text ({held.label}) has {len(held.tokens)} tokens, too few to predict "
            "one from another; choose a longer text or a larger eval_fraction"
        )
    train_examples = _examples(train, config, tokenizer, keep_tail=False)
    test_examples = None
    lines = [_describe("training text", train, train_examples, origins[0])]
    if config.test_half:
        held, test = _halves(held, config)
        test_examples = _examples(test, config, tokenizer, keep_tail=True)
        lines.append(_describe("test text", test, test_examples, origins[-1]))
    held_examples = _examples(held, config, tokenizer, keep_tail=True)
    lines.insert(1, _describe("held-out text", held, held_examples, origins[-1]))
    return Data(train_examples, held_examples, test_examples, "\n".join(lines), spans)


def _halves(held: _Part, config: DataConfig) -> tuple[_Part, _Part]:
    """Both halves of a text, cut between two examples."""
    count = math.ceil(len(held.tokens) / config.sequence_length) if config.pack else len(held.ends)
    if config.pack:
        cut = count // 2 * config.sequence_length
        documents = int(np.searchsorted(held.ends, cut))
        first, second = np.append(held.ends[:documents], cut), held.ends[documents:] - cut
    else:
        cut = int(held.ends[count // 2 - 1]) if count > 1 else 0
        first, second = held.ends[: count // 2], held.ends[count // 2 :] - cut
    if min(cut, len(held.tokens) - cut) < 2:
        raise UserError(
            f"the held-out text ({held.label}) is too short to keep half of it for a test: name a longer one, or a "
            "shorter sequence_length"
        )
    return (
        _Part(held.tokens[:cut], first, f"{held.identity} first half {cut}", f"the first half of {held.label}"),
        _Part(held.tokens[cut:], second, f"{held.identity} second half {cut}", f"the second half of {held.label}"),
    )


def _examples(part: _Part, config: DataConfig, tokenizer: PreTrainedTokenizerFast, *, keep_tail: bool) -> Examples:
    length, pad = config.sequence_length, tokenizer.pad_token_id
    identity = f"{part.identity} pad {pad}"
    if config.pack:
        return PackedExamples(part.tokens, length, pad_id=pad, fingerprint=identity, keep_tail=keep_tail)
    end = tokenizer.eos_token_id
    found = TruncatedExamples(part.tokens, part.ends, length, pad_id=pad, end_id=end, fingerprint=identity)
    if not found.predicted:
        raise UserError(
            f"{part.label} has no token to predict: each of its documents is a single token. Choose another text or "
            "tokenizer, or join the documents (pack)"
        )
    return found


def _describe(role: str, part: _Part, examples: Examples, origin: str) -> str:
    documents, tokens = _count(len(part.ends), "document"), _count(len(part.tokens), "token")
    kind = "packed" if isinstance(examples, PackedExamples) else "truncated or padded"
    empty = f" ({_count(part.without_text, 'more document')} without text)" if part.without_text else ""
    dropped = f", {_count(examples.dropped, 'token')} left out" if examples.dropped else ""
    return (
        f"{role}: {part.label}, {documents}{empty}, {tokens}, in {_count(len(examples), f'{kind} example')} of "
        f"{examples.sequence_length}{dropped} ({origin})"
    )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
