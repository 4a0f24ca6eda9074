"""What was trained on is not held out: copies of files, equal documents, and texts that are cut in another place."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from megalr.data import Data, DataConfig, load_data, load_tokenizer
from megalr.data.files import local_files
from megalr.data.overlap import Span, repeated, tokens_trained_on


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return load_tokenizer(None)


def read(tokenizer: PreTrainedTokenizerFast, cache: Path, **settings: Any) -> Data:
    return load_data(DataConfig(cache_dir=str(cache), **settings), tokenizer, rank=0, barrier=lambda: None)


def write_jsonl(path: Path, texts: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_copies_among_files_are_left_out_and_named(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Otherwise one is trained on and the other held out."""
    folder = tmp_path / "texts"
    folder.mkdir()
    texts = {"a.txt": "one two three " * 99, "b.txt": "nine ten eleven " * 99, "c.txt": "six sev eight " * 99}
    for name, text in texts.items():
        (folder / name).write_text(text)
    (folder / "c (copy).txt").write_text(texts["c.txt"])
    os.link(folder / "b.txt", folder / "z.txt")
    data = read(tokenizer, tmp_path, dataset=str(folder), pack=False, sequence_length=8)
    assert len(data.train) + len(data.evaluation) == 3
    assert data.description.splitlines()[-1].endswith(
        f"2 copies of other files: {folder / 'c.txt'} (of {folder / 'c (copy).txt'}), {folder / 'z.txt'} "
        f"(of {folder / 'b.txt'})"
    )
    large = b"x" * 300_000  # of which only three places are looked at first
    (folder / "x.txt").write_bytes(large[:100_000] + b"y" + large[100_001:])
    (folder / "y.txt").write_bytes(large)
    assert {file.name for file in local_files([str(folder / "[xy].txt")])[0]} == {"x.txt", "y.txt"}


def test_documents_of_the_training_text_that_are_held_out_are_counted(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    lines = [f"document {number} of a text in which each is another" for number in range(40)]
    same, other = write_jsonl(tmp_path / "a.jsonl", [*lines, lines[3]]), write_jsonl(tmp_path / "b.jsonl", lines)
    spans = read(tokenizer, tmp_path, dataset=str(same), sequence_length=8, eval_fraction=0.05).spans
    tokens = len(tokenizer(lines[3])["input_ids"]) + 1
    assert f"WARNING: {tokens} of the {len(spans[1])} held-out tokens are in documents" in repeated(*spans)
    assert tokens_trained_on(*spans) == 0  # in another place
    assert repeated(*read(tokenizer, tmp_path, dataset=str(other), sequence_length=8).spans) == ""


def test_what_was_trained_on_is_found_wherever_a_text_is_cut(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(3):
        words = (str((number + 1) * (at + 7) ** 3 % 997) for at in range(400))
        (folder / f"{number}.txt").write_text(" ".join(words))
    (tmp_path / "copy.txt").write_bytes((folder / "1.txt").read_bytes())

    def spans(name: str | Path, **settings: Any) -> tuple[Span, Span]:
        return read(tokenizer, tmp_path, dataset=str(tmp_path / name), sequence_length=8, **settings).spans

    whole, one = spans("texts"), spans("texts/1.txt")
    assert len(whole[1].ends) == 3 and len(one[1].ends) == 1
    assert tokens_trained_on(whole[0], whole[1]) == 0
    quarter = spans("texts/1.txt", eval_fraction=0.25)[1]
    assert tokens_trained_on(one[0], quarter) == len(quarter) - len(one[1])
    for text in ("texts/1.txt", "copy.txt"):
        end = spans(text)[1]
        assert tokens_trained_on(whole[0], end) == len(end)  # its end, of the middle of the training text
        cut = spans(text, max_train_tokens=500)[1]
        assert tokens_trained_on(whole[0], cut) == len(cut)
        assert tokens_trained_on(one[0], end) == 0  # which the same fraction holds out
    assert tokens_trained_on(whole[0], spans("texts/2.txt")[1]) == 0
    begun = spans("texts/1.txt", max_train_tokens=500, eval_fraction=0.1)[0]
    most = spans("copy.txt", eval_fraction=0.9)[1]
    assert tokens_trained_on(begun, most) == 450 - most.start > 0
