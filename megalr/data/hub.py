"""Text and tokenizers of the Hugging Face hub, and what to say when it cannot be reached."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megalr.data.documents import Piece, document_pieces, row_text
from megalr.errors import UserError

LOCAL_OPTIONS = (
    "Without the hub you can use the embedded text (--dataset austen, the default) or your own "
    "(--dataset my.txt, my.jsonl, my.parquet or a folder of them), with the embedded tokenizer "
    "(no --tokenizer) or your own (--tokenizer path/of/tokenizer.json)."
)
_PROBE_SECONDS = 10.0


@dataclass(frozen=True)
class HubText:
    """One split of a hub dataset, streamed: nothing but its tokens is ever written to the disk.

    Attributes:
        name, config_name, split: as ``datasets.load_dataset`` takes them.
        text_column: the column that holds the text.
        optional: a missing split is an empty text rather than an error.
    """

    name: str
    config_name: str | None
    split: str
    text_column: str
    optional: bool = False

    @property
    def label(self) -> str:
        """Name, configuration and split, such as "allenai/c4 en train"."""
        return " ".join(part for part in (self.name, self.config_name, self.split) if part)

    def identity(self) -> dict[str, Any]:
        """The names alone: asking the hub for the content's version would need the hub at every start."""
        return {
            "hub": self.name,
            "config": self.config_name,
            "split": self.split,
            "text_column": self.text_column,
        }

    def pieces(self) -> Iterator[Piece]:
        """All documents, in the hub's order.

        Raises:
            UserError: no such dataset, configuration, split or column, or no connection.
        """
        rows = iter(self._stream())
        for number in itertools.count():
            try:
                row = next(rows, None)
            except Exception as error:  # the many kinds of a broken connection or a broken file
                raise UserError(
                    f"reading {self.label} from the hub failed after {number} documents: "
                    f"{_words(error)}. {LOCAL_OPTIONS}"
                ) from error
            if row is None:
                return
            yield from document_pieces(row_text(row, self.text_column, f"hub dataset {self.name}"))

    def _stream(self) -> Any:
        import datasets

        problem = connection_problem()
        if problem is not None:
            raise UserError(
                f'"{self.name}" is no local file, and the hub cannot be reached to look for a dataset of '
                f"that name: {problem}. {LOCAL_OPTIONS}"
            )
        try:
            return datasets.load_dataset(self.name, self.config_name, split=self.split, streaming=True)
        except Exception as error:  # the hub's client has no common class for what can go wrong
            if self.optional and isinstance(error, ValueError) and "split" in str(error).lower():
                return []
            raise UserError(
                f'"{self.name}" is no local file, and as a hub dataset (configuration '
                f'{self.config_name or "not given"}, split "{self.split}") it cannot be read: '
                f"{_words(error)}. {LOCAL_OPTIONS}"
            ) from error


def connection_problem() -> str | None:
    """Why the hub cannot be reached, or None if it can.

    One short request without retries: the hub's own client would try for minutes before it gives up. Where
        the user
    has switched the hub off (``HF_HUB_OFFLINE``) the client itself fails at once, or reads its own cache.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return None
    try:
        get_session().head(constants.ENDPOINT, timeout=_PROBE_SECONDS)
    except Exception as error:  # any failure of any HTTP library means the same here
        return f"{constants.ENDPOINT}: {_words(error)}"
    return None


def _words(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).rstrip(".")
