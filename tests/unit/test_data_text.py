"""From text to examples: the embedded novels, local files, what is held out, and what bad input gets."""

from __future__ import annotations

import gzip
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Regex, normalizers, processors
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from megalr.data import Data, DataConfig, is_hub_dataset, load_data, load_tokenizer
from megalr.data import train_tokenizer as training
from megalr.data.documents import NO_TEXT, PIECE_CHARACTERS, document_pieces
from megalr.data.sources import AUSTEN_FOLDER, refuse_text_column
from megalr.data.tokenizer import EMBEDDED_TOKENIZER
from megalr.data.tokens import TokenCache
from megalr.errors import UserError
from megalr.train.preparation import how_often

TEXTS = [
    "It is a truth.",
    "Universally acknowledged; that\na single man.",
    "",
    None,
    "In want <|endoftext|> of a wife.",
]
WORDS = [text for text in TEXTS if text]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return load_tokenizer(None)


@pytest.fixture(scope="module")
def austen(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Data:
    return read(tokenizer, tmp_path_factory.mktemp("cache"))


def read(tokenizer: PreTrainedTokenizerFast, cache: Path, **settings: Any) -> Data:
    return load_data(DataConfig(cache_dir=str(cache), **settings), tokenizer, rank=0, barrier=lambda: None)


def content(data: Data, part: str = "train") -> list[list[int]]:
    return [tokens[:valid].tolist() for tokens, valid in getattr(data, part)]


def write_jsonl(path: Path, texts: Sequence[str | None], column: str = "text") -> Path:
    path.write_text("".join(json.dumps({"id": 1, column: text}) + "\n" for text in texts))
    return path


def held_out(folder: Path) -> str:
    (folder / "held out").mkdir()
    (folder / "held out" / "other.txt").write_text("another text, of no interest")
    return str(folder / "held out")


# --- the embedded novels ---


def test_the_held_out_novel_is_in_neither_the_training_text_nor_the_tokenizer(
    austen: Data, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    trained_on = tokenizer.decode(np.concatenate([tokens for tokens, _ in austen.train]))
    held_out = tokenizer.decode(np.concatenate([tokens[:valid] for tokens, valid in austen.evaluation]))
    novel = (AUSTEN_FOLDER / "persuasion.txt").read_text()
    assert held_out == novel + "<|endoftext|>"
    assert trained_on.count("<|endoftext|>") == 4  # between five novels; the last one's end is in the dropped tail
    assert "Mansfield Park" in trained_on
    for paragraph in novel.split("\n\n"):
        assert len(paragraph) < 80 or paragraph not in trained_on

    novels = sorted(str(path) for path in AUSTEN_FOLDER.glob("*.txt") if path.name != "persuasion.txt")
    assert len(novels) == 5
    assert training.main(["--output", str(tmp_path / "again.json"), *novels]) == 0
    again = load_tokenizer(str(tmp_path / "again.json"))
    assert again.get_vocab() == tokenizer.get_vocab()  # those five novels alone make this tokenizer


def test_every_token_of_the_novels_is_trained_on_or_counted_as_left_out(austen: Data) -> None:
    assert austen.train.tokens == len(austen.train) * 256
    assert austen.train.dropped < 256
    assert austen.evaluation.dropped == 0
    assert austen.train.tokens + austen.train.dropped == 874_676
    assert austen.evaluation.tokens == 121_688
    assert austen.evaluation.token_counts(4096).sum() == 121_688 - len(austen.evaluation)
    assert "training text: austen, 5 documents, 874,676 tokens" in austen.description
    assert "180 tokens left out" in austen.description


def test_the_embedded_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) == 4096
    assert tokenizer.bos_token == tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.pad_token == "<|pad|>"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    strange = "naïve café 😀\r\n\t x"
    assert tokenizer.decode(tokenizer(strange)["input_ids"]) == strange


def test_a_text_in_pieces_has_the_tokens_of_the_whole(tokenizer: PreTrainedTokenizerFast) -> None:
    text = (AUSTEN_FOLDER / "emma.txt").read_text()[:150_000]
    cut = [piece.text for piece in document_pieces(text)]
    assert "".join(cut) == text
    assert len(cut) > 150_000 // PIECE_CHARACTERS
    assert sum(tokenizer(cut)["input_ids"], []) == tokenizer(text)["input_ids"]
    assert [piece.text for piece in document_pieces("x" * (PIECE_CHARACTERS + 1))] == [
        "x" * PIECE_CHARACTERS,
        "x",
    ]
    assert list(document_pieces(" \n ")) == list(document_pieces("")) == [NO_TEXT]


# --- local files ---


def as_jsonl(folder: Path) -> Path:
    return write_jsonl(folder / "my text.jsonl", TEXTS)


def as_gzip(folder: Path) -> Path:
    (folder / "my text.json.gz").write_bytes(gzip.compress(as_jsonl(folder).read_bytes()))
    return folder / "my text.json.gz"


def as_parquet(folder: Path) -> Path:
    pyarrow.parquet.write_table(pyarrow.table({"id": range(5), "text": TEXTS}), folder / "my text.parquet")
    return folder / "my text.parquet"


def as_folder_of_txt(folder: Path) -> Path:
    (folder / "my texts" / ".hidden").mkdir(parents=True)
    for number, text in enumerate(WORDS):
        (folder / "my texts" / f"{number}.txt").write_text(text)
    (folder / "my texts" / "empty.txt").write_text(" \n")
    (folder / "my texts" / "notes.md").write_text("not to be read")
    (folder / "my texts" / ".hidden" / "0.txt").write_text("not to be read")
    return folder / "my texts"


def as_glob(folder: Path) -> Path:
    return as_folder_of_txt(folder) / "*.txt"


@pytest.mark.parametrize("form", [as_jsonl, as_gzip, as_parquet, as_folder_of_txt, as_glob])
def test_every_form_of_local_text_gives_the_same_documents(
    form: Callable[[Path], Path], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    source = str(form(tmp_path))
    data = read(tokenizer, tmp_path, dataset=source, eval_dataset=held_out(tmp_path), pack=False, sequence_length=32)
    plain = [tokenizer.encode(text, split_special_tokens=True) for text in WORDS[:2]]
    documents = content(data)
    assert documents[:2] == [ids + [tokenizer.eos_token_id] for ids in plain]
    assert tokenizer.decode(documents[2]) == WORDS[2] + "<|endoftext|>"
    assert documents[2].count(tokenizer.eos_token_id) == 1  # a special token's name in a text is just text
    assert len(documents) == 3


def test_a_file_named_twice_is_read_once(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    file = as_jsonl(tmp_path)
    names = [str(file), str(tmp_path / "*.jsonl"), str(tmp_path / "." / file.name)]
    data = read(tokenizer, tmp_path, dataset=names, eval_dataset=held_out(tmp_path), pack=False, sequence_length=8)
    assert len(data.train) == 3


def test_half_a_surrogate_pair_does_not_stop_the_reading(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", ["half a \ud83d face", "a whole 😀 face"])
    data = read(
        tokenizer,
        tmp_path,
        dataset=str(file),
        eval_dataset=held_out(tmp_path),
        pack=False,
        sequence_length=12,
    )
    texts = [tokenizer.decode(ids[:-1]) for ids in content(data)]
    assert texts == ["half a ? face", "a whole 😀 face"]


def test_a_text_column_of_another_name(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", WORDS, column="body")
    data = read(tokenizer, tmp_path, dataset=str(file), text_column="body", pack=False, sequence_length=8)
    assert len(data.train) + len(data.evaluation) == 3


def test_a_text_column_of_plain_text_is_refused(tmp_path: Path) -> None:
    plain, rows = tmp_path / "a.txt", write_jsonl(tmp_path / "b.jsonl", WORDS, column="body")
    plain.write_text("words")
    for settings in ({"dataset": str(plain)}, {"dataset": "austen"}):
        refuse_text_column(DataConfig(**settings))
        with pytest.raises(UserError, match="--text-column body is for JSONL, .* and the text is .*: leave it out"):
            refuse_text_column(DataConfig(**settings, text_column="body"))
    refuse_text_column(DataConfig(dataset=str(plain), eval_dataset=str(rows), text_column="body"))
    refuse_text_column(DataConfig(dataset="allenai/c4", text_column="body"))


# --- what is held out ---


def test_the_last_documents_are_held_out(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [f"document {number}" for number in range(40)])
    data = read(tokenizer, tmp_path, dataset=str(file), eval_fraction=0.1, pack=False, sequence_length=8)
    texts = [tokenizer.decode(ids[:-1]) for ids in content(data) + content(data, "evaluation")]
    assert texts == [f"document {number}" for number in range(40)]
    assert len(data.evaluation) == 4
    assert "the last 4 documents of" in data.description

    packed = read(tokenizer, tmp_path, dataset=str(file), eval_fraction=0.1, sequence_length=8)
    joined = sum(content(data), [])
    assert sum(content(packed), []) == joined[: packed.train.tokens]
    assert packed.train.dropped == len(joined) % 8
    assert sum(content(packed, "evaluation"), []) == sum(content(data, "evaluation"), [])


def test_the_last_tokens_of_a_single_document_are_held_out(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(text := " ".join(str(number) for number in range(300)))
    data = read(tokenizer, tmp_path, dataset=str(tmp_path / "a.txt"), eval_fraction=0.25, sequence_length=5)
    whole = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    held = round(len(whole) * 0.25)
    assert sum(content(data, "evaluation"), []) == whole[-held:]
    assert sum(content(data), []) == whole[:-held][: data.train.tokens]
    assert data.train.dropped == (len(whole) - held) % 5


def test_a_text_that_is_read_more_than_four_times_is_said_loudly(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", ["one two three four"] * 40)
    whole = read(tokenizer, tmp_path, dataset=str(file), sequence_length=4)
    cut = read(tokenizer, tmp_path, dataset=str(file), sequence_length=4, max_train_tokens=100)
    for data, flag in ((whole, "a longer --dataset"), (cut, "a larger --max-train-tokens, which cuts the text at 100")):
        count, tokens = len(data.train), data.train.tokens
        assert how_often(data, count) == f"the run reads {tokens} tokens: 1.00 epochs of {tokens} training tokens"
        assert how_often(data, 4 * count).endswith(f" tokens: 4.00 epochs of {tokens} training tokens")
        often = how_often(data, 6 * count - 1)
        assert f" epochs of {tokens} training tokens\nWARNING: the text is read 6.0 times, and what is read " in often
        assert f"write {flag}, or fewer --steps" in often


def test_a_text_without_a_token_to_predict_is_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [f"document {number}" for number in range(9)])
    alone = load_tokenizer(None)
    alone.backend_tokenizer.normalizer = normalizers.Replace(Regex(".*"), "")
    settings = {"dataset": str(file), "sequence_length": 2, "eval_fraction": 0.5}
    assert "each of its documents is a single token" in rejected(alone, tmp_path, **settings, pack=False)
    assert read(alone, tmp_path, **settings).train.predicted == 2


def test_limits_on_tokens(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", ["one two three four"] * 40)
    each = len(tokenizer("one two three four")["input_ids"]) + 1
    limited = read(
        tokenizer, tmp_path, dataset=str(file), max_train_tokens=10 * each + 3, sequence_length=2, pack=False
    )
    assert len(limited.train) + len(limited.evaluation) == 11
    held = read(
        tokenizer,
        tmp_path,
        dataset=str(file),
        eval_fraction=0.5,
        max_eval_tokens=3 * each + 1,
        sequence_length=each,
    )
    assert held.evaluation.tokens == 3 * each
    assert held.train.tokens + held.train.dropped == 37 * each


# --- bad input ---


@pytest.mark.parametrize("pack", [True, False])
def test_half_of_the_held_out_text_is_kept_for_a_test(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, pack: bool
) -> None:
    text = write_jsonl(tmp_path / "text.jsonl", [f"{i} times as many words as before" for i in range(25)])
    kept = write_jsonl(tmp_path / "kept.jsonl", [f"a novel of {i} words and a few more" for i in range(7)])
    settings = {"dataset": str(text), "eval_dataset": str(kept), "sequence_length": 16, "pack": pack}
    whole = read(tokenizer, tmp_path / "cache", **settings)
    halved = read(tokenizer, tmp_path / "cache", **settings, test_half=True)
    first, second = content(halved, "evaluation"), content(halved, "test")
    assert whole.test is None
    assert first + second == content(whole, "evaluation")
    assert content(halved) == content(whole)
    assert 0 <= len(second) - len(first) <= 1
    assert len({whole.evaluation.fingerprint, halved.evaluation.fingerprint, halved.test.fingerprint}) == 3
    short = write_jsonl(tmp_path / "short.jsonl", ["two words"])
    settings["eval_dataset"] = str(short)
    assert "too short to keep half" in rejected(tokenizer, tmp_path / "cache", **settings, test_half=True)


def rejected(tokenizer: PreTrainedTokenizerFast, cache: Path, **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        read(tokenizer, cache, **settings)
    return str(caught.value)


def test_files_that_cannot_be_read(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin1"))
    (tmp_path / "table.csv").write_text("a,b")
    (tmp_path / "list.jsonl").write_text('{"text": "a"}\n[1]\n')
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text"\n')
    (tmp_path / "number.jsonl").write_text('{"text": 3}\n')
    (tmp_path / "broken.parquet").write_text("not parquet")
    (tmp_path / "broken.txt.gz").write_text("not gzip")
    (tmp_path / "folder" / ".hidden").mkdir(parents=True)
    (tmp_path / "folder" / "a.zst").write_text("not to be read")
    expected = {
        "missing.txt": "there is no file, folder or match of a pattern called",
        "missing*": "there is no file, folder or match",
        "empty.txt": "holds no text to train on",
        "latin.txt": "is not UTF-8 text",
        "table.csv": "ends in none of .txt, .jsonl",
        "list.jsonl": "line 2 holds a list; expected one object a line",
        "broken.jsonl": "line 2 is not JSON",
        "number.jsonl": '"text" of .*number.jsonl, line 1 holds int, expected text',
        "broken.parquet": "cannot read .*broken.parquet",
        "broken.txt.gz": "ends in none of",
        "folder": "holds no file that ends in one of .*: it holds 1 .zst, 1 hidden folder",
    }
    for name, words in expected.items():
        with pytest.raises(UserError, match=words):
            read(tokenizer, tmp_path / "cache", dataset=str(tmp_path / name))


LINES = [json.dumps({"text": f"line {number} é"}, ensure_ascii=False).encode() for number in range(1, 4000)]


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (b'{"text": "na\xefve"}', "is not UTF-8 text: line 3000, byte {byte:d} .* is 0xef; .* `iconv -f latin1"),
        (b'{"text": "cut\xc3"}', "is not UTF-8 text: line 3000, byte {byte:d} .* is 0xc3; .* `iconv -c"),
        (b'{"text": ', "line 3000 is not JSON .*; expected one object a line: mend the line, or delete it"),
        (b"[" * 100_000, "line 3000 is not JSON .maximum recursion depth"),
        (b'{"text": 1' + b"0" * 5000 + b"}", "line 3000 is not JSON"),
        (b'{"text": 7}', "line 3000 holds int, expected text"),
        (b'{"texts": "a"}', 'line 3000 has no column "text"; .* out of: texts'),
        (b'"text"', "line 3000 holds a str; expected one object a line"),
    ],
)
@pytest.mark.parametrize("suffix", ["jsonl", "json.gz"])
def test_a_bad_line_is_named_before_anything_is_tokenized(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, suffix: str, bad: bytes, words: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr(TokenCache, "_chunks", lambda *_: pytest.fail("work that the bad line would have ended"))
    content = b"\n".join([*LINES[:2999], bad, *LINES[2999:]])
    byte = content.index(bad) + next((at for at, value in enumerate(bad) if value > 127), 0)
    file = tmp_path / f"a.{suffix}"
    file.write_bytes(gzip.compress(content, 1) if suffix == "json.gz" else content)
    assert re.search(f"{file}.* {words.format(byte=byte)}", rejected(tokenizer, tmp_path, dataset=str(file)))


def test_a_bad_byte_is_found_wherever_it_is(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megalr.data.readers._BLOCK_BYTES", 5)
    for content, words in (
        ("é\n" * 7 + "aé", "line 8, byte 22 .* is 0xc3"),  # cut off in the middle of a character
        ("😀\n" * 6 + "\udcff", "line 7, byte 30 .* is 0xff"),
        ("\udcff", "line 1, byte 0 "),
        ("\udcff\udcfea\0", "begins as UTF-16 does; convert it with `iconv -f utf-16"),
    ):
        data = content.encode(errors="surrogateescape")
        (tmp_path / "a.txt").write_bytes(data[:-1] if content.endswith("aé") else data)
        assert re.search(words, rejected(tokenizer, tmp_path, dataset=str(tmp_path / "a.txt")))


def test_a_damaged_or_cut_archive_is_named(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    whole = gzip.compress(b"\n".join(LINES))
    file = tmp_path / "a.jsonl.gz"
    middle = len(whole) // 2
    for content in (whole[:-3], whole[:middle], whole[:middle] + b"\xff" * 64 + whole[middle + 64 :], b"no gzip", b""):
        file.write_bytes(content)
        message = rejected(tokenizer, tmp_path, dataset=str(file))
        expected = "holds no text" if content == b"" else "is damaged or cut off .*: copy or download it again"
        assert re.search(f"{file} {expected}", message)


def test_damaged_parquet_is_named(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    table = pyarrow.table({"text": [f"{number} rows and more" for number in range(3000)]})
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(table, file, compression="none", write_page_checksum=True)
    whole = file.read_bytes()
    for at in (whole.index(b"2000 rows"), len(whole) - 1):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
        message = rejected(tokenizer, tmp_path, dataset=str(file))
        assert f"cannot read {file} after row " in message and "it is damaged, or no Parquet file" in message
    file.write_bytes(whole[:-100])
    assert "it is damaged, or no Parquet file" in rejected(tokenizer, tmp_path, dataset=str(file))
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), file)
    assert "a.parquet, row 1 holds int, expected text" in rejected(tokenizer, tmp_path, dataset=str(file))


def test_files_that_were_joined_may_have_marks_in_their_middle(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    part = "\ufeff" + "".join(f'{{"text": "{word}"}}\n' for word in ("one", "two"))
    (tmp_path / "a.jsonl").write_text(part * 2)
    data = read(tokenizer, tmp_path, dataset=str(tmp_path / "a.jsonl"), pack=False, sequence_length=4)
    assert [tokenizer.decode(ids[:-1]) for ids in content(data)] == ["one", "two", "one"]


def test_what_is_left_out_is_said(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "texts"
    names = "a.txt b.jsonl.zst c.zst d.json README .e.txt f/g.txt locked/h.txt .git/i.txt"
    for name in names.split():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text(f"one two three four five of {name} " * 9)
    (folder / "empty.jsonl").touch()
    (folder / "link").symlink_to(tmp_path)
    scandir = os.scandir

    def locked(path: Any) -> Any:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr("os.scandir", locked)
    data = read(tokenizer, tmp_path, dataset=str(folder), sequence_length=2)
    assert data.description.splitlines()[-1] == (
        f"left out of {folder}: 2 .zst, 1 .json, 1 empty file, 1 file without a suffix, 1 folder that cannot be read "
        f"({folder}/locked: Permission denied), 1 hidden file, 1 hidden folder, 1 link to a folder "
        "(.txt, .jsonl, .jsonl.gz, .json.gz, .parquet are read)"
    )
    assert len(data.train) + len(data.evaluation) > 2 and "2 files of" in data.description
    pattern = read(tokenizer, tmp_path, dataset=str(folder / "*"), sequence_length=2)
    assert "left out of " + str(folder / "*") + ": 3 folders, 2 .zst, 1 .json" in pattern.description
    assert "left out of" not in read(tokenizer, tmp_path, dataset=str(folder / "a.txt"), sequence_length=2).description


def test_documents_without_text_are_counted(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", ["one", None, "two", " ", "", "three"])
    data = read(tokenizer, tmp_path, dataset=str(file), pack=False, sequence_length=4)
    assert f"training text: {file}, 2 documents (3 more documents without text), " in data.description
    assert len(data.train) + len(data.evaluation) == 3


def test_a_missing_text_column_lists_the_columns(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    for file in (as_jsonl(tmp_path), as_parquet(tmp_path)):
        message = rejected(tokenizer, tmp_path, dataset=str(file), text_column="body")
        assert 'has no column "body"' in message
        assert message.endswith("id, text")


def test_too_little_text(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    file = str(as_jsonl(tmp_path))
    for pack in (True, False):
        message = rejected(tokenizer, tmp_path, dataset=file, sequence_length=256, pack=pack)
        assert "sequence_length is 256, but the training text" in message
        assert "choose a shorter sequence or a longer text" in message
    (tmp_path / "empty.txt").write_text("")
    message = rejected(tokenizer, tmp_path, dataset=file, eval_dataset=str(tmp_path / "empty.txt"), sequence_length=8)
    assert f"the held-out text ({tmp_path / 'empty.txt'}) is empty" in message
    (tmp_path / "short.txt").write_text("one two three four")
    message = rejected(tokenizer, tmp_path, dataset=str(tmp_path / "short.txt"), eval_fraction=0.1, sequence_length=2)
    assert "too few to predict one from another" in message


def test_texts_that_cannot_go_together(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    file = str(as_jsonl(tmp_path))
    assert "both in the training and in the held-out text" in rejected(
        tokenizer, tmp_path, dataset=file, eval_dataset=[str(tmp_path / "*.jsonl")]
    )
    assert '"austen" is no local file or folder' in rejected(tokenizer, tmp_path, dataset=[file, "austen"])
    copy = tmp_path / "copies" / "other.jsonl"
    copy.parent.mkdir()
    copy.write_bytes(Path(file).read_bytes())
    message = rejected(tokenizer, tmp_path, dataset=file, eval_dataset=str(copy.parent))
    assert f"{copy} of the held-out text holds byte for byte what {file} of the training text does" in message


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sequence_length": 1}, "sequence_length is 1"),
        ({"eval_fraction": 1.0}, "eval_fraction is 1.0"),
        ({"max_train_tokens": 0}, "max_train_tokens is 0"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        DataConfig(**settings)


def test_what_is_a_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "books").mkdir()
    assert is_hub_dataset("allenai/c4")
    assert is_hub_dataset(["wikitext"])
    for local in (
        "austen",
        "books",
        "data/a.txt",
        "./c4",
        "~/c4",
        "c4*",
        "a/b/c",
        ["allenai/c4", "wikitext"],
    ):
        assert not is_hub_dataset(local)


# --- tokenizers ---


def test_a_tokenizer_file_and_a_saved_folder_are_the_same_tokenizer(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path / "saved")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "tokenizer.json").write_bytes(EMBEDDED_TOKENIZER.read_bytes())
    for name in (EMBEDDED_TOKENIZER, tmp_path / "saved", tmp_path / "bare"):
        other = load_tokenizer(str(name))
        assert other.get_vocab() == tokenizer.get_vocab()
        assert (other.eos_token_id, other.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)


def test_a_tokenizer_without_padding_pads_with_its_end_of_text(tmp_path: Path) -> None:
    text = EMBEDDED_TOKENIZER.read_text().replace("<|pad|>", "<|other|>")
    (tmp_path / "tokenizer.json").write_text(text)
    other = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert other.pad_token_id == other.eos_token_id == 0


def test_a_tokenizer_marks_no_text_with_what_training_never_shows(tmp_path: Path) -> None:
    """What is exported turns a text into the tokens that were trained on, in transformers' hands as well."""
    beginning, file = "<|im_start|>", tmp_path / "a.jsonl"
    write_jsonl(file, WORDS)
    found = load_tokenizer(None)
    plain = found("It is a truth.")["input_ids"]
    found.add_special_tokens({"bos_token": beginning})
    mark = processors.TemplateProcessing(
        single=f"{beginning} $A", pair=f"{beginning} $A $B", special_tokens=[(beginning, found.bos_token_id)]
    )
    found.backend_tokenizer.post_processor = mark
    found.save_pretrained(tmp_path / "marked")
    assert AutoTokenizer.from_pretrained(tmp_path / "marked")("It is a truth.")["input_ids"] == [4096, *plain]
    said: list[str] = []

    tokenizer = load_tokenizer(str(tmp_path / "marked"), say=said.append)

    data = read(tokenizer, tmp_path, dataset=str(file), pack=False, sequence_length=16)
    assert content(data)[0] == [*plain, tokenizer.eos_token_id]
    assert len(said) == 1 and f"marks a text with {beginning}" in said[0] and "<|endoftext|> alone" in said[0]
    tokenizer.save_pretrained(tmp_path / "exported")
    exported = AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert exported("It is a truth.")["input_ids"] == plain
    assert exported.bos_token == exported.eos_token == "<|endoftext|>"
    load_tokenizer(str(tmp_path / "exported"), say=said.append)
    assert len(said) == 1


@pytest.mark.parametrize("explicit", [None, True])
def test_llamas_tokenizer_stays_as_it_was_trained_with(tmp_path: Path, explicit: bool | None) -> None:
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, "a": 4}
    LlamaTokenizer(vocab=vocabulary, merges=[], add_bos_token=True).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    if explicit is not None:  # which has transformers write the template anew whenever it loads
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "add_bos_token": explicit}))
    assert AutoTokenizer.from_pretrained(tmp_path)("a")["input_ids"] == [1, 3, 4]
    load_tokenizer(str(tmp_path)).save_pretrained(tmp_path / "exported")
    assert AutoTokenizer.from_pretrained(tmp_path / "exported")("a")["input_ids"] == [3, 4]


@pytest.mark.parametrize(("template", "ids"), [("$A <|endoftext|>", []), ("<|endoftext|> $A", [0])])
def test_an_end_of_text_stands_before_a_text_alone(tmp_path: Path, template: str, ids: list[int]) -> None:
    """Behind a prompt, as T5's, the model would begin another text; lm_eval would score it in a word's place."""
    found = load_tokenizer(None)
    plain = found("a")["input_ids"]
    end = processors.TemplateProcessing(single=template, special_tokens=[("<|endoftext|>", 0)])
    found.backend_tokenizer.post_processor = end
    found.save_pretrained(tmp_path)
    said: list[str] = []
    tokenizer = load_tokenizer(str(tmp_path), say=said.append)
    assert tokenizer("a")["input_ids"] == [*ids, *plain] and len(said) == 1 - len(ids)
    tokenizer.save_pretrained(tmp_path / "exported")
    assert AutoTokenizer.from_pretrained(tmp_path / "exported")("a")["input_ids"] == [*ids, *plain]


def test_tokenizers_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "endless.json").write_text(EMBEDDED_TOKENIZER.read_text().replace("<|endoftext|>", "<|other|>"))
    expected = {
        "missing.json": "there is no tokenizer file or folder called",
        "broken.json": "is not a tokenizer.json",
        "endless.json": "has no end-of-text token",
        "": "holds no tokenizer.json",
        "odd": "tokenizer_config.json is no file",
    }
    (tmp_path / "odd" / "tokenizer_config.json").mkdir(parents=True)
    (tmp_path / "odd" / "tokenizer.json").write_bytes(EMBEDDED_TOKENIZER.read_bytes())
    for name, words in expected.items():
        with pytest.raises(UserError, match=words):
            load_tokenizer(str(tmp_path / name))


def test_training_a_tokenizer_on_nothing_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert training.main(["--output", str(tmp_path / "out.json"), str(tmp_path / "missing.txt")]) == 2
    assert "missing.txt" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()
