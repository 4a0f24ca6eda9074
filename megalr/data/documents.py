"""Documents as a stream of pieces, so that a text of any size passes through a bounded amount of memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from megalr.errors import UserError

PIECE_CHARACTERS = 1 << 14
_SHOWN_COLUMNS = 20


class Piece(NamedTuple):
    """A run of a document's text. A document is all pieces up to and including one that ends it."""

    text: str
    ends_document: bool


NO_TEXT = Piece("", False)  # stands for a document without text, which is to be counted, not to be trained on


def document_pieces(text: str) -> Iterator[Piece]:
    """The pieces of a document that is in memory, as :func:`pieces` cuts it."""
    return pieces(text[at : at + PIECE_CHARACTERS] for at in range(0, len(text), PIECE_CHARACTERS))


def pieces(blocks: Iterable[str]) -> Iterator[Piece]:
    """Cuts one document, given as blocks of text, into pieces of at most ``PIECE_CHARACTERS`` characters.

    A cut falls in front of white space, where byte-level tokenizers start a new word anyway, so that the
    pieces have the same tokens as the whole document. One of white space alone is ``NO_TEXT``, unless it is
    longer than a piece: whether text follows is not known when its first piece is due.
    """
    rest = ""
    started = False
    for block in blocks:
        rest += block
        while len(rest) > PIECE_CHARACTERS:
            cut = _cut(rest)
            yield Piece(rest[:cut], False)
            rest = rest[cut:]
            started = True
    yield Piece(rest, True) if started or rest.strip() else NO_TEXT


def row_text(row: Mapping[str, Any], column: str, where: str) -> str:
    """The text of one row of a table or one JSON object; "" where it is null.

    Raises:
        UserError: no such column, or something else than text in it.
    """
    if column not in row:
        raise UserError(missing_column(where, column, list(row)))
    value = row[column]
    if value is not None and not isinstance(value, str):
        raise UserError(f'"{column}" of {where} holds {type(value).__name__}, expected text: "..." or null')
    # JSON can hold half of a surrogate pair, which no tokenizer takes; it becomes a question mark
    return (value or "").encode("utf-8", "replace").decode("utf-8")


def missing_column(where: str, column: str, columns: list[str]) -> str:
    """The message for a text column that is not there."""
    names = ", ".join(columns[:_SHOWN_COLUMNS]) + (", ..." if len(columns) > _SHOWN_COLUMNS else "")
    return f'{where} has no column "{column}"; name the one that holds the text (text_column), out of: {names}'


def _cut(text: str) -> int:
    """Where to cut ``text``, in 1 .. PIECE_CHARACTERS: before a line break, a space, or anywhere."""
    for separator in "\n ":
        cut = text.rfind(separator, 1, PIECE_CHARACTERS)
        while cut > 0 and text[cut - 1].isspace():
            cut -= 1
        if cut > 0:
            return cut
    return PIECE_CHARACTERS
