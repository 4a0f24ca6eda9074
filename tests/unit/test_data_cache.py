"""The token cache: reused when nothing changed, made anew when something did, whole or not there."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from megalr.data import Data, DataConfig, load_data, load_tokenizer
from megalr.data.sources import LocalText
from megalr.data.tokens import TokenCache, TokenStore
from megalr.errors import UserError
from tests.processes import python, run
from tests.unprivileged import unprivileged


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return load_tokenizer(None)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my text.txt"
    path.write_text("It is a truth universally acknowledged. " * 20)
    return path


def read(file: Path, tokenizer: PreTrainedTokenizerFast, **settings: Any) -> Data:
    config = DataConfig(dataset=str(file), cache_dir=str(file.parent / "my cache"), sequence_length=8, **settings)
    return load_data(config, tokenizer, rank=0, barrier=lambda: None)


def cache(file: Path, tokenizer: PreTrainedTokenizerFast) -> TokenCache:
    return TokenCache(LocalText((file,), str(file)), tokenizer, file.parent / "my cache" / "tokens", None)


def stored(place: TokenCache) -> TokenStore:
    store = place.load()
    assert store is not None
    return store


def names(file: Path) -> list[str]:
    return sorted(path.name for path in (file.parent / "my cache" / "tokens").iterdir())


def test_the_second_run_reuses_the_cache(
    file: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = read(file, tokenizer)
    assert "tokenized in" in first.description
    monkeypatch.setattr(TokenCache, "write", lambda self: pytest.fail("tokenized again"))
    os.utime(file, (1, 1))  # a fresh clone has other times and the same text
    for settings in ({}, {"eval_fraction": 0.5}, {"seed": 3}, {"pack": False}):
        second = read(file, tokenizer, **settings)
        assert "reused the cache" in second.description
    assert read(file, tokenizer).train.fingerprint == first.train.fingerprint


def test_a_changed_file_or_tokenizer_is_tokenized_anew(
    file: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    first = read(file, tokenizer)
    times = file.stat()
    file.write_text(file.read_text().replace("truth", "quest"))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # even with its old size and time
    second = read(file, tokenizer)
    assert "tokenized in" in second.description
    assert second.train.fingerprint != first.train.fingerprint
    other = load_tokenizer(None)
    other.add_tokens(["universally"])
    assert "tokenized in" in read(file, other).description
    assert len(names(file)) == 3


def test_large_texts_are_known_by_path_size_and_time(
    file: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megalr.data.sources._HASHED_BYTES", 10)
    read(file, tokenizer)
    assert "reused" in read(file, tokenizer).description
    os.utime(file, (1, 1))
    assert "tokenized" in read(file, tokenizer).description


def test_small_vocabularies_take_two_bytes_a_token_and_large_ones_four(
    file: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    small = cache(file, tokenizer)
    small.write()
    large_tokenizer = load_tokenizer(None)
    large_tokenizer.add_tokens([f"<{number}>" for number in range(70_000)])
    large = cache(file, large_tokenizer)
    large.write()
    assert stored(small).tokens.dtype == np.uint16
    assert stored(large).tokens.dtype == np.uint32
    assert stored(small).tokens.tolist() == stored(large).tokens.tolist()


def with_ids(ids: dict[str, int], **special: str) -> PreTrainedTokenizerFast:
    """A tokenizer of words with these ids; "</s>" ends a text."""
    words = Tokenizer(WordLevel({"</s>": 0, "<unk>": 1, **ids}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", **{"eos_token": "</s>", "pad_token": "</s>", **special}
    )


@pytest.mark.parametrize("largest", [65_535, 65_536, 70_000])
def test_few_entries_may_have_large_ids(tmp_path: Path, largest: int) -> None:
    words = with_ids({"one": 2, "last": largest}, eos_token="last")
    (tmp_path / "a.jsonl").write_text('{"text": "one one one"}\n' * 3)
    for pack in (True, False):
        data = read(tmp_path / "a.jsonl", words, pack=pack, eval_fraction=0.4)
        assert data.train[0][0][:2].tolist() == [2, 2]
        assert [tokens[:valid].tolist() for tokens, valid in data.evaluation] == [[2, 2, 2, largest]]
        assert data.evaluation.token_counts(largest + 1)[largest] == 1
        with pytest.raises(UserError, match=f"token id {largest:,}, but the model's vocabulary has {largest:,}"):
            data.evaluation.token_counts(largest)
    config = DataConfig(dataset=str(tmp_path / "a.jsonl"), cache_dir=str(tmp_path), sequence_length=2, pack=False)
    cut = load_data(config, words, rank=0, barrier=lambda: None)
    assert cut.train[0][0].tolist() == [2, largest]  # truncated, the end in its place


def test_ids_that_cannot_be_trained_on_are_refused(file: Path) -> None:
    far = with_ids({"It": 5})
    far.get_vocab = lambda: {"It": 1 << 31}
    with pytest.raises(UserError, match="token id 2,147,483,648"):
        cache(file, far)
    missing = with_ids({"It": 5})
    missing.get_vocab = lambda: {"</s>": 0, "<unk>": 1}  # a file whose parts disagree
    with pytest.raises(UserError, match="into the token id 5, but the largest of its vocabulary is 1"):
        cache(file, missing).write()
    assert not any(names(file))


def test_a_text_stays_the_one_that_a_checkpoint_was_trained_with(
    file: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Another hash of the same tokens would refuse every run that goes on."""
    cache(file, tokenizer).write()
    assert stored(cache(file, tokenizer)).digest == "ae8262da26b4cd2387cafdf848bac8595349cc6a5adab2fe78d7be529425abfc"


def test_a_file_that_is_gone_is_named(file: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    file.unlink()
    with pytest.raises(UserError, match="cannot read .*my text.txt: No such file"):
        cache(file, tokenizer)


def test_many_batches_give_the_tokens_of_one(
    file: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = file.parent / "rows.jsonl"
    path.write_text("".join(f'{{"text": "row {number}"}}\n' for number in range(50)))
    whole = TokenCache(LocalText((path,), "rows"), tokenizer, file.parent / "whole", None)
    whole.write()
    monkeypatch.setattr("megalr.data.tokens._BATCH_PIECES", 7)
    parts = TokenCache(LocalText((path,), "rows"), tokenizer, file.parent / "parts", None)
    parts.write()
    assert stored(parts).tokens.tolist() == stored(whole).tokens.tolist()
    assert stored(parts).ends.tolist() == stored(whole).ends.tolist()
    assert stored(parts).digest == stored(whole).digest
    cut = TokenCache(LocalText((path,), "rows"), tokenizer, file.parent / "cut", 40)
    cut.write()
    assert stored(cut).tokens.tolist() == stored(whole).tokens[:40].tolist()
    assert stored(cut).ends[-1] == 40


@pytest.mark.parametrize("damage", ["tokens.bin", "ends.bin", "meta.json"])
def test_a_damaged_cache_is_not_loaded_but_replaced(
    file: Path, tokenizer: PreTrainedTokenizerFast, damage: str
) -> None:
    place = cache(file, tokenizer)
    place.write()
    good = stored(place).tokens.tolist()
    damaged = place.folder / damage
    damaged.write_bytes(damaged.read_bytes()[:-2])
    assert place.load() is None
    place.write()
    assert stored(place).tokens.tolist() == good
    assert len(names(file)) == 1


KILLED = """
import os, sys
from pathlib import Path
from megalr.data import load_tokenizer, tokens
from megalr.data.sources import LocalText
file = Path(sys.argv[1])
place = tokens.TokenCache(LocalText((file,), str(file)), load_tokenizer(None), Path(sys.argv[2]), None)
rename = Path.rename
Path.rename = lambda *_: os._exit(9)  # as SIGKILL does: no clean-up runs
place.write()
"""


def test_a_killed_process_leaves_nothing_that_loads(file: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    place = cache(file, tokenizer)
    assert run(python(KILLED, file, place.folder.parent), check=False).code == 9
    assert [name.startswith(".partial-") for name in names(file)] == [True]
    assert place.load() is None
    place.write()
    assert len(names(file)) == 2  # somebody might still be writing the other
    partial = next(place.folder.parent.glob(".partial-*"))
    for path in (*partial.iterdir(), partial):
        os.utime(path, (time.time() - 2 * 24 * 3600,) * 2)
    other = file.with_name("other.txt")
    other.write_text("other")
    cache(other, tokenizer).write()
    assert not partial.exists()


def test_of_two_processes_the_faster_wins_and_the_slower_agrees(
    file: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, fast = cache(file, tokenizer), cache(file, tokenizer)
    rename = Path.rename

    def overtaken(path: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "rename", rename)
        fast.write()
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", overtaken)
    slow.write()
    assert stored(slow).digest == stored(fast).digest
    assert len(names(file)) == 1


def test_only_rank_zero_writes_and_all_ranks_read_the_same(file: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    config = DataConfig(dataset=str(file), cache_dir=str(file.parent), sequence_length=8)
    waits: list[int] = []

    def rank_zero_arrives() -> None:
        waits.append(1)
        load_data(config, tokenizer, rank=0, barrier=lambda: None)

    other = load_data(config, tokenizer, rank=1, barrier=rank_zero_arrives)
    own = load_data(config, tokenizer, rank=0, barrier=lambda: None)
    assert waits == [1]
    assert other.train.fingerprint == own.train.fingerprint
    assert [tokens.tolist() for tokens, _ in other.train] == [tokens.tolist() for tokens, _ in own.train]


def test_no_rank_waits_for_one_that_failed(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xff")
    config = DataConfig(dataset=str(tmp_path / "a.txt"), cache_dir=str(tmp_path))
    for rank, words in ((0, "is not UTF-8"), (1, "the first process could not prepare the text")):
        waits: list[int] = []
        with pytest.raises(UserError, match=words):
            load_data(config, tokenizer, rank=rank, barrier=lambda waits=waits: waits.append(1))  # type: ignore[misc]
        assert waits == [1]
    assert not (tmp_path / "tokens").exists()  # the text is read once before anything is written


def test_a_cache_folder_that_cannot_be_written(file: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (file.parent / "my cache").write_text("a file, not a folder")
    with pytest.raises(UserError, match="MEGALR_CACHE"):
        read(file, tokenizer)


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("MEGALR_CACHE", raising=False)
    assert DataConfig().cache_folder == tmp_path / ".cache/megalr/tokens"
    monkeypatch.setenv("MEGALR_CACHE", "/scratch")
    assert DataConfig().cache_folder == Path("/scratch/tokens")
    assert DataConfig(cache_dir="here").cache_folder == Path("here/tokens")


def test_a_home_that_cannot_hold_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    home, temporary = tmp_path / "home", tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.delenv("MEGALR_CACHE", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    mine = temporary / f"megalr-{os.getuid()}"
    monkeypatch.setenv("HOME", "/dev/null/home")
    assert DataConfig().cache_folder == mine / "tokens"
    monkeypatch.setenv("HOME", str(home))
    home.mkdir(mode=0o555)
    with unprivileged():
        assert DataConfig().cache_folder == mine / "tokens"
        mine.mkdir()
        mine.chmod(0o777)  # others could write there what is taken for tokens
        assert DataConfig().cache_folder == home / ".cache/megalr/tokens"
        mine.chmod(0o700)
        assert DataConfig().cache_folder == mine / "tokens"
    home.chmod(0o755)
    (home / ".cache/megalr").mkdir(parents=True)
    home.chmod(0o555)
    with unprivileged():
        assert DataConfig().cache_folder == home / ".cache/megalr/tokens"  # what was read before is there


def test_a_text_that_changes_while_it_is_tokenized_is_refused(tokenizer, tmp_path, monkeypatch):
    """Else the tokens of the new text would be found by everybody who has the old one."""
    file = tmp_path / "a.txt"
    file.write_text("The cat sat on the mat. ")
    place = TokenCache(LocalText((file,), str(file)), tokenizer, tmp_path / "tokens", None)
    write_files = TokenCache._write_files

    def changed(cache, folder, pieces):
        file.write_text("Zebras eat grass all day. ")
        write_files(cache, folder, pieces)

    monkeypatch.setattr(TokenCache, "_write_files", changed)
    with pytest.raises(UserError, match="was changed while it was tokenized"):
        place.write()
    assert place.load() is None
    assert list((tmp_path / "tokens").iterdir()) == []
