"""Local files as documents. What cannot be read is named by file, line and byte, with what to do about it."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from megalr.data.documents import PIECE_CHARACTERS, Piece, document_pieces, missing_column, pieces, row_text
from megalr.errors import UserError

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".json.gz", ".parquet")

_BOM = "\ufeff"
_UTF16_BOMS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_BLOCK_BYTES = 1 << 20


def suffix(file: Path) -> str:
    """One of ``SUFFIXES`` if the file's name ends in it, else its own last suffix; lower case."""
    lower = file.name.lower()
    return next((each for each in SUFFIXES if lower.endswith(each)), file.suffix.lower())


def read_file(file: Path, column: str) -> Iterator[Piece]:
    """All documents of a file: a .txt file is one document, so is a line of JSONL and a row of Parquet.

    Args:
        file: its suffix is one of ``SUFFIXES``.
        column: the key or column that holds the text.

    Raises:
        UserError: it cannot be read, is damaged, is not UTF-8, or lacks the column.
    """
    try:
        try:
            yield from _READERS[suffix(file)](file, column)
        except UnicodeDecodeError as error:
            raise UserError(f"{file} is not UTF-8 text: {_bad_byte(file)}") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{file} is damaged or cut off ({error}): copy or download it again") from error
    except OSError as error:
        raise UserError(f"cannot read {file}: {error}") from error


def _read_txt(file: Path, _: str) -> Iterator[Piece]:
    with _open_text(file) as stream:
        yield from pieces(iter(lambda: stream.read(PIECE_CHARACTERS), ""))


def _read_jsonl(file: Path, column: str) -> Iterator[Piece]:
    with _open_text(file) as stream:
        for number, line in enumerate(stream, start=1):
            content = line.lstrip(_BOM)  # files that were joined have one at the start of each
            if not content.strip():
                continue
            where = f"{file}, line {number}"
            try:
                row = json.loads(content)
            except (ValueError, RecursionError) as error:
                words = f"{where} is not JSON ({error}); expected one object a line: mend the line, or delete it"
                raise UserError(words) from error
            if not isinstance(row, dict):
                raise UserError(
                    f'{where} holds a {type(row).__name__}; expected one object a line, such as {{"{column}": "..."}}'
                )
            yield from document_pieces(row_text(row, column, where))


def _read_parquet(file: Path, column: str) -> Iterator[Piece]:
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file, page_checksum_verification=True) as table:
            names = table.schema_arrow.names
            if column not in names:
                raise UserError(missing_column(str(file), column, names))
            for batch in table.iter_batches(batch_size=1024, columns=[column]):
                for value in batch.column(0):
                    number += 1
                    yield from document_pieces(row_text({column: value.as_py()}, column, f"{file}, row {number}"))
    except UserError:
        raise
    except UnicodeDecodeError as error:
        raise UserError(f"{file}, row {number} is not UTF-8 text ({error}): write the file again without it") from error
    except Exception as error:  # pyarrow has many kinds for what it meets in a damaged file
        raise UserError(
            f"cannot read {file} after row {number} ({error}): it is damaged, or no Parquet file; copy or download it "
            "again"
        ) from error


_READERS = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl,
    ".json.gz": _read_jsonl,
    ".parquet": _read_parquet,
}


def _open_text(file: Path) -> IO[str]:
    return io.TextIOWrapper(_open_bytes(file), encoding="utf-8-sig")


def _open_bytes(file: Path) -> Any:
    return gzip.open(file) if file.suffix.lower() == ".gz" else file.open("rb")


def _bad_byte(file: Path) -> str:
    """Where the first byte is that is not UTF-8, in a .gz counted without compression, and what to do about it."""
    rest, start, line = b"", 0, 1
    with _open_bytes(file) as stream:
        while True:
            new = stream.read(_BLOCK_BYTES)
            block = rest + new
            try:
                _, consumed = codecs.utf_8_decode(block, "strict", not new)
            except UnicodeDecodeError as error:
                if start == 0 and block.startswith(_UTF16_BOMS):
                    return "it begins as UTF-16 does; convert it with `iconv -f utf-16 -t utf-8`"
                line += block.count(b"\n", 0, error.start)
                return (
                    f"line {line}, byte {start + error.start} (from 0) is 0x{block[error.start]:02x}; convert a Latin-1"
                    " file with `iconv -f latin1 -t utf-8`, or drop such bytes with `iconv -c -f utf-8 -t utf-8`"
                )
            if not new:
                return "it has changed while it was read"
            line += block.count(b"\n", 0, consumed)
            rest, start = block[consumed:], start + consumed
