"""Tables, and the cards that they stand in."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from megalr.webpage.foreign import escaped


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], text: Collection[int] = ()) -> str:
    """The HTML of a table, which scrolls sideways where there is no room.

    Args:
        columns: their titles; text.
        rows: of cells, each of which is HTML.
        text: the numbers of the columns that hold text, which stands on the left and may break.
    """
    sides = [' class="text"' if index in text else "" for index in range(len(columns))]
    head = "".join(f'<th scope="col"{side}>{escaped(title)}</th>' for side, title in zip(sides, columns, strict=True))
    body = "".join(
        f"<tr>{''.join(f'<td{side}>{cell}</td>' for side, cell in zip(sides, row, strict=True))}</tr>" for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def pairs(rows: Sequence[tuple[str, str]]) -> str:
    """The HTML of names and values, both text."""
    body = "".join(
        f'<tr><th scope="row">{escaped(name)}</th><td class="text">{escaped(value)}</td></tr>' for name, value in rows
    )
    return f'<div class="scroll"><table class="pairs"><tbody>{body}</tbody></table></div>'


def card(name: str, title: str, body: str, note: str = "", *, wide: bool = False) -> str:
    """A framed part of a section.

    Args:
        name: unique on the page, of letters and hyphens.
        title, note: text above the body; either may be empty.
        body: HTML.
        wide: whether it takes a whole row of a grid.
    """
    head = f"<h3>{escaped(title)}</h3>" if title else ""
    words = f'<p class="note">{escaped(note)}</p>' if note else ""
    return f'<div class="card{" wide" if wide else ""}" id="{name}">{head}{words}{body}</div>'
