"""Trains a byte-level BPE: ``python -m megalr.data.train_tokenizer --output tokenizer.json TEXT...``"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from megalr.data.documents import NO_TEXT
from megalr.data.files import local_files
from megalr.data.sources import LocalText
from megalr.data.tokenizer import END_OF_TEXT, PAD
from megalr.disk import write_and_sync
from megalr.errors import UserError
from megalr.flags import PlainParser, nonempty, path, positive

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SMALLEST = 258  # two special tokens and the bytes


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
    parser = PlainParser(prog="python -m megalr.data.train_tokenizer", description=__doc__)
    parser.add_argument("texts", type=nonempty, nargs="+", help="files, folders or globs: .txt, .jsonl, .parquet")
    parser.add_argument("--output", required=True, type=path, help="the tokenizer.json to write")
    parser.add_argument(
        "--vocabulary", type=positive, default=4096, help="entries, special tokens included (default 4096)"
    )
    parser.add_argument(
        "--text-column", type=nonempty, default="text", help="where JSONL and Parquet hold the text (default text)"
    )
    try:
        chosen = parser.parse_args(arguments)
        if chosen.vocabulary < SMALLEST:
            parser.error(f"argument --vocabulary: {chosen.vocabulary} is less than the {SMALLEST} entries of all bytes")
        if chosen.output.is_dir() or not chosen.output.parent.is_dir():
            parser.error(f"argument --output: {chosen.output} is a folder, or in one that is not there: name a file")
        files, left_out = local_files(chosen.texts)
        if left_out:
            print(left_out, file=sys.stderr)
        source = LocalText(tuple(files), ", ".join(chosen.texts), chosen.text_column)
        if chosen.output.resolve() in [file.resolve() for file in source.files]:
            parser.error(f"argument --output: {chosen.output} is one of the texts: name another file")
        if chosen.output.exists() and not _is_tokenizer(chosen.output):
            parser.error(f"argument --output: {chosen.output} is there, and is no tokenizer: name another file")
        if all(piece is NO_TEXT for piece in source.pieces()):
            raise UserError(f"{source.label} holds no text to train on")
        tokenizer = train_tokenizer((piece.text for piece in source.pieces()), chosen.vocabulary)
        # What is there stays until all is written, also under its other names, of which one may be a text's.
        place = chosen.output.resolve()
        part = place.with_name(f".{place.name}.part")
        try:
            write_and_sync(part, tokenizer.to_str(pretty=True))
            os.replace(part, place)
        finally:
            part.unlink(missing_ok=True)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{chosen.output}: {tokenizer.get_vocab_size()} entries")
    return 0


def _is_tokenizer(file: Path) -> bool:
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_str(file.read_text(encoding="utf-8") if file.is_file() else "")
    except Exception:  # tokenizers raises no other kind
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
