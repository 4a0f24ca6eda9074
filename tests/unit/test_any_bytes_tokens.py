"""Any bytes where cached tokens, metrics or texts are expected: a result, or a message, within a second."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from megalr.data import load_tokenizer
from megalr.data.examples import PackedExamples, TruncatedExamples
from megalr.data.readers import SUFFIXES, read_file
from megalr.data.sources import LocalText
from megalr.data.tokens import TokenCache
from megalr.errors import UserError
from megalr.train.loss_curve import read_history
from megalr.train.metrics import MetricsLog, read_rows

FEW = settings(max_examples=50, deadline=1000, derandomize=True, database=None)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.just(10**400)
VALUES = SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(st.text(max_size=3), SCALARS, max_size=2)


def damaged(good: bytes) -> SearchStrategy[bytes]:
    """Anything, or a part of what was good, or that with a few bytes exchanged."""
    places = st.lists(st.tuples(st.integers(0, max(0, len(good) - 1)), st.binary(min_size=1, max_size=8)), max_size=3)

    def change(changes: list[tuple[int, bytes]]) -> bytes:
        content = good
        for at, new in changes:
            content = content[:at] + new + content[at + len(new) :]
        return content

    return st.binary(max_size=200) | st.integers(0, len(good)).map(lambda end: good[:end]) | places.map(change)


def objects(good: dict[str, Any]) -> SearchStrategy[bytes]:
    """JSON objects with these keys, some with another value, some missing."""
    changed = st.dictionaries(st.sampled_from(sorted(good)), VALUES, max_size=3)
    missing = st.sets(st.sampled_from(sorted(good)), max_size=1)
    return st.tuples(changed, missing).map(
        lambda both: json.dumps({k: v for k, v in {**good, **both[0]}.items() if k not in both[1]}).encode()
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> TokenCache:
    folder = tmp_path_factory.mktemp("cache")
    (folder / "a.jsonl").write_text("".join(f'{{"text": "document {number}"}}\n' for number in range(5)))
    place = TokenCache(LocalText((folder / "a.jsonl",), "a"), load_tokenizer(None), folder / "tokens", None)
    place.write()
    shutil.copytree(place.folder, folder / "good")
    return place


@pytest.mark.parametrize("name", ["meta.json", "tokens.bin", "ends.bin"])
def test_cached_tokens(cache: TokenCache, name: str) -> None:
    good = cache.folder.parent.parent / "good"
    content = (good / name).read_bytes()

    @FEW
    @given(damaged(content) | (objects(json.loads(content)) if name == "meta.json" else st.nothing()))
    def check(data: bytes) -> None:
        (cache.folder / name).write_bytes(data)
        store = cache.load()
        if store is None:
            return
        assert name == "meta.json" or data == content  # what was damaged is not used
        pad = {"pad_id": 1, "fingerprint": store.digest}
        for examples in (
            PackedExamples(store.tokens, 4, keep_tail=True, **pad),
            TruncatedExamples(store.tokens, store.ends, 4, end_id=0, **pad),
        ):
            assert examples.token_counts(4096).sum() == examples.predicted

    try:
        check()
    finally:
        shutil.copy(good / name, cache.folder / name)
    assert cache.load() is not None


ROW = {"step": 0, "tokens": 8, "loss": 1.5, "eval_loss": 2.0, "eval_perplexity": 7.4, "events": ["merge"]}


@FEW
@given(lines=st.lists(damaged(json.dumps(ROW).encode()) | objects(ROW), max_size=5))
def test_metrics(tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]) -> None:
    path = tmp_path_factory.getbasetemp() / "metrics.jsonl"
    path.write_bytes(b"\n".join(lines))
    rows = list(read_rows(path))
    log = MetricsLog(path, enabled=True)
    perplexity = log.untrained_perplexity()
    assert perplexity is None or isinstance(perplexity, int | float)
    history = read_history(path)
    assert len(history.losses) == len(history.tokens) <= len(rows)
    log.cut(10**9)
    assert len(list(read_rows(path))) == sum(row["step"] <= 10**9 for row in rows)


def good_file(suffix: str, folder: Path) -> bytes:
    file = folder / "good"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": ["one", None, "two"]}), file)
        return file.read_bytes()
    content = "é\n" if suffix == ".txt" else '{"text": "é"}\n\n{"text": null}\n'
    return gzip.compress(content.encode(), mtime=0) if suffix.endswith(".gz") else content.encode()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_texts(tmp_path: Path, suffix: str) -> None:
    good, file = good_file(suffix, tmp_path), tmp_path / f"a{suffix}"

    @FEW
    @given(damaged(good) | (objects({"text": "a", "id": 1}) if suffix == ".jsonl" else st.nothing()))
    def check(data: bytes) -> None:
        file.write_bytes(data)
        try:
            found = list(read_file(file, "text"))
        except UserError as error:
            assert str(file) in str(error)
        else:
            assert all(isinstance(piece.text, str) for piece in found)

    check()
