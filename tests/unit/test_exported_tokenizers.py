"""The tokenizer of an export turns a text into the tokens that were trained on, whatever class it was of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, processors
from transformers import AutoTokenizer, CodeLlamaTokenizer

from megalr.checkpoint.export.folder import save_tokenizer
from megalr.data import load_tokenizer
from megalr.data.tokenizer import digest_of_tokenizer
from megalr.errors import UserError

TOKENIZERS_OF_MODELS = [
    ("RobertaTokenizer", models.BPE, {"cls_token": "<s>", "sep_token": "</s>"}),
    ("BartTokenizer", models.BPE, {"cls_token": "<s>", "sep_token": "</s>"}),
    ("DebertaTokenizer", models.BPE, {"cls_token": "<s>", "sep_token": "</s>"}),
    ("WhisperTokenizer", models.BPE, {}),
    ("CodeLlamaTokenizer", models.BPE, {}),
    ("NllbTokenizer", models.BPE, {"cls_token": "<s>", "sep_token": "</s>"}),
    ("BertTokenizer", models.WordPiece, {"cls_token": "<s>", "sep_token": "</s>"}),
    ("XLNetTokenizer", models.Unigram, {"cls_token": "<s>", "sep_token": "</s>"}),
    ("MBartTokenizer", models.Unigram, {"cls_token": "<s>", "sep_token": "</s>"}),
    ("XLMRobertaTokenizer", models.Unigram, {"cls_token": "<s>", "sep_token": "</s>"}),
    ("PreTrainedTokenizerFast", models.BPE, {}),
]


@pytest.mark.parametrize(
    ("name", "kind", "special"), TOKENIZERS_OF_MODELS, ids=[row[0] for row in TOKENIZERS_OF_MODELS]
)
def test_tokenizers_of_models_are_exported_without_their_marks(
    tmp_path: Path, name: str, kind: Any, special: dict[str, str]
) -> None:
    """Most of them put their marks around a text whenever they load, whatever their tokenizer.json says."""
    words = ["<s>", "<pad>", "</s>", "<unk>", "▁", "Ġ", *"abcdefghijklmnopqrstuvwxyz"]
    numbered = {word: i for i, word in enumerate(words)}
    model = {
        models.BPE: lambda: models.BPE(numbered, [], unk_token="<unk>"),
        models.WordPiece: lambda: models.WordPiece(numbered, unk_token="<unk>"),
        models.Unigram: lambda: models.Unigram([(word, -1.0) for word in words], unk_id=3),
    }[kind]()
    (tmp_path / "of a model").mkdir()
    Tokenizer(model).save(str(tmp_path / "of a model" / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", **special}
    settings = {
        "tokenizer_class": name,
        "model_max_length": 77,
        "padding_side": "left",
        "chat_template": "a",
        **special,
    }
    (tmp_path / "of a model" / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(str(tmp_path / "of a model"))
    trained_on = tokenizer.backend_tokenizer.encode("a bc", add_special_tokens=False).ids
    (tmp_path / "out").mkdir()

    save_tokenizer(tokenizer, tmp_path / "out")

    exported = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert exported("a bc")["input_ids"] == trained_on == exported("a bc", add_special_tokens=False)["input_ids"]
    assert exported.decode(trained_on) == tokenizer.decode(trained_on)
    assert exported.bos_token_id == exported.eos_token_id == tokenizer.eos_token_id == numbered["</s>"]
    assert (exported.pad_token_id, exported.unk_token_id) == (numbered["<pad>"], numbered["<unk>"])
    assert (exported.model_max_length, exported.padding_side, exported.chat_template) == (77, "left", "a")
    assert "token_type_ids" not in exported("a bc")
    assert digest_of_tokenizer(exported) == digest_of_tokenizer(tokenizer)


def test_a_tokenizer_that_reads_a_text_otherwise_once_it_is_saved_is_refused(tmp_path: Path) -> None:
    """As a class that writes its own marks anew."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, "a": 4}
    tokenizer = CodeLlamaTokenizer(vocab=vocabulary, merges=[], name_or_path="some/tokenizer")
    backend: Any = tokenizer.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B")
    words = r"the tokenizer some/tokenizer is another one .*\(marks around a text\): CodeLlamaTokenizer builds it anew"
    with pytest.raises(UserError, match=words):
        save_tokenizer(tokenizer, tmp_path)
