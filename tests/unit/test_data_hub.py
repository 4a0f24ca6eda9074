"""Hub datasets, with the hub replaced: streamed up to a limit, and what a user reads without a hub."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from megalr.data import Data, DataConfig, load_data, load_tokenizer
from megalr.errors import UserError

Rows = Callable[..., Iterator[dict[str, Any]]]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return load_tokenizer(None)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


class Hub:
    """Stands in for ``datasets.load_dataset``: endless rows of the splits it has; counts the rows read."""

    def __init__(self, *splits: str) -> None:
        self.splits = splits
        self.asked: list[tuple[Any, ...]] = []
        self.read = 0

    def __call__(self, name: str, config: str | None, *, split: str, streaming: bool) -> Iterator[dict[str, Any]]:
        assert streaming
        self.asked.append((name, config, split))
        if split not in self.splits:
            raise ValueError(f"Bad split: {split}. Available splits: {list(self.splits)}")
        return self._rows(split)

    def _rows(self, split: str) -> Iterator[dict[str, Any]]:
        while True:
            self.read += 1
            yield {"text": f"{split} document", "url": "u"}


def read(tokenizer: PreTrainedTokenizerFast, cache: Path, **settings: Any) -> Data:
    settings = {"dataset": "allenai/c4", "dataset_config": "en", "sequence_length": 20, **settings}
    return load_data(DataConfig(cache_dir=str(cache), **settings), tokenizer, rank=0, barrier=lambda: None)


def test_an_endless_dataset_is_read_up_to_the_limits_and_cached(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.load_dataset", hub := Hub("train", "validation"))
    monkeypatch.setattr("megalr.data.tokens._BATCH_PIECES", 16)
    data = read(tokenizer, tmp_path, max_train_tokens=1000, max_eval_tokens=100)
    assert hub.asked == [("allenai/c4", "en", "train"), ("allenai/c4", "en", "validation")]
    assert data.train.tokens == 1000
    assert data.evaluation.tokens == 100
    assert hub.read < 400
    assert "train document<|endoftext|>train document" in tokenizer.decode(data.train[0][0])
    assert "validation document" in tokenizer.decode(data.evaluation[0][0])
    again = read(tokenizer, tmp_path, max_train_tokens=1000, max_eval_tokens=100)
    assert len(hub.asked) == 2
    assert again.train.fingerprint == data.train.fingerprint
    assert "allenai/c4 en train" in again.description


def test_a_dataset_without_a_validation_split_holds_back_its_last_documents(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.load_dataset", hub := Hub("train"))
    for _ in range(2):
        data = read(tokenizer, tmp_path, max_train_tokens=1000, eval_fraction=0.1)
        assert data.train.tokens + data.train.dropped + data.evaluation.tokens == 1000
        assert "the last" in data.description
    assert len(hub.asked) == 2  # what is not there is remembered too
    with pytest.raises(UserError, match=r'split "validation"\) it cannot be read: Bad split'):
        read(tokenizer, tmp_path, max_train_tokens=1000, eval_dataset="org/other")


def test_a_missing_column_lists_the_columns(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.load_dataset", Hub("train"))
    with pytest.raises(UserError, match=r'hub dataset allenai/c4 has no column "body".*text, url'):
        read(tokenizer, tmp_path, text_column="body")


def test_a_connection_that_breaks_leaves_no_cache(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rows(*_: Any, **__: Any) -> Iterator[dict[str, Any]]:
        yield {"text": "one document"}
        raise ConnectionError("the line went dead")

    monkeypatch.setattr("datasets.load_dataset", rows)
    with pytest.raises(UserError, match="failed after 1 documents: the line went dead. Without the hub you can"):
        read(tokenizer, tmp_path)
    assert not list((tmp_path / "tokens").iterdir())


def test_without_a_hub_the_message_names_what_works(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    started = time.perf_counter()
    with pytest.raises(UserError) as text:
        read(tokenizer, tmp_path)
    with pytest.raises(UserError) as vocabulary:
        load_tokenizer("t5-base")
    for message in (str(text.value), str(vocabulary.value)):
        assert "--dataset austen" in message
        assert "--dataset my.txt, my.jsonl, my.parquet" in message
        assert "--tokenizer path/of/tokenizer.json" in message
    assert '"allenai/c4" is no local file' in str(text.value)
    assert "cannot load the tokenizer t5-base" in str(vocabulary.value)
    assert time.perf_counter() - started < 10


def test_an_unreachable_hub_is_asked_once(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    class Session:
        def head(self, url: str, timeout: float) -> None:
            asked.append(url)
            assert timeout <= 10
            raise OSError("name or service not known")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_session", Session)
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: pytest.fail("the client would retry for long"))
    with pytest.raises(UserError, match="the hub cannot be reached .* name or service not known"):
        read(tokenizer, tmp_path)
    with pytest.raises(UserError, match="name or service not known"):
        load_tokenizer("no/such-tokenizer")
    assert len(asked) == 2
