"""Trains a byte-level BPE: ``python -m megalr.data.train_tokenizer --output tokenizer.json TEXT...``"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from megalr.data.files import local_files
from megalr.data.sources import LocalText
from megalr.data.tokenizer import END_OF_TEXT, PAD
from megalr.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def train_tokenizer(texts: Iterable[str], vocabulary: int = 4096) -> Tokenizer:
    """A byte-level BPE of at most ``vocabulary`` entries: two special tokens, the 256 bytes, and merges.

    Every text can be written in it, as bytes need no unknown token; equal texts give an equal tokenizer.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m megalr.data.train_tokenizer", description=__doc__)
    parser.add_argument("texts", nargs="+", help="files, folders or globs: .txt, .jsonl, .parquet")
    parser.add_argument("--output", required=True, type=Path, help="the tokenizer.json to write")
    parser.add_argument("--vocabulary", type=int, default=4096, help="entries, special tokens included (default 4096)")
    parser.add_argument("--text-column", default="text", help="where JSONL and Parquet hold the text (default text)")
    chosen = parser.parse_args(arguments)
    try:
        files, left_out = local_files(chosen.texts)
        if left_out:
            print(left_out, file=sys.stderr)
        source = LocalText(tuple(files), "", chosen.text_column)
        tokenizer = train_tokenizer((piece.text for piece in source.pieces()), chosen.vocabulary)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    chosen.output.write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    print(f"{chosen.output}: {tokenizer.get_vocab_size()} entries")
    return 0


if __name__ == "__main__":
    sys.exit(main())
