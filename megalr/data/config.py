"""What to read, how to cut it into examples, and where the tokens are kept."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megalr.errors import UserError
from megalr.ops.trust import distrust


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The text of a run, its tokenizer, and how it is cut and ordered.

    Attributes:
        dataset: ``"austen"`` (embedded), a local file, folder or glob (.txt, .jsonl, .parquet, .jsonl.gz,
            .json.gz), several of those, or a hub dataset's name such as ``"allenai/c4"``.
        dataset_config: the hub dataset's configuration, such as ``"en"``.
        eval_dataset: the held-out text, named as ``dataset`` is. None means ``persuasion.txt`` for the
            embedded text, the hub dataset's "validation" split, and otherwise the last ``eval_fraction`` of
            the text itself.
        eval_fraction: how much is held out where the text has no held-out part of its own: of the documents
            if there is more than one, of the tokens if there is one.
        text_column: the JSONL key or column that holds the text.
        tokenizer: None for the embedded 4,096-entry BPE; else a ``tokenizer.json``, a folder, or a hub name.
        sequence_length: tokens of one example.
        pack: join the documents and cut full sequences; False truncates or pads each document to one example.
        seed: of the order of the training examples.
        cache_dir: None means ``$MEGALR_CACHE``, or ``~/.cache/megalr`` without it; where the home cannot hold that, a
            folder of yours in the temporary directory.
        max_train_tokens: read no more training tokens than this. None means all of a local text and the first
            100 million of a hub dataset, which may be endless for all we know.
        max_eval_tokens: hold out no more tokens than this, or one document where the text is split between
            documents. None means all of a local text, 10 million of a hub one.
        test_half: keep the second half of the held-out text apart, for a test at the end: what is chosen by the
            first half has not been chosen by that.

    Raises:
        UserError: a value that cannot work.
    """

    dataset: str | Sequence[str] = "austen"
    dataset_config: str | None = None
    eval_dataset: str | Sequence[str] | None = None
    eval_fraction: float = 0.05
    text_column: str = "text"
    tokenizer: str | None = None
    sequence_length: int = 256
    pack: bool = True
    seed: int = 0
    cache_dir: str | None = None
    max_train_tokens: int | None = None
    max_eval_tokens: int | None = None
    test_half: bool = False

    def __post_init__(self) -> None:
        if self.sequence_length < 2:
            raise UserError(
                f"sequence_length is {self.sequence_length}; it needs at least 2 tokens, one to read and one to predict"
            )
        if not 0 < self.eval_fraction < 1:
            raise UserError(
                f"eval_fraction is {self.eval_fraction}; write a part of the text between 0 and 1, such as 0.05"
            )
        for name in ("max_train_tokens", "max_eval_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}; write a positive number of tokens, or leave it out")

    @property
    def cache_folder(self) -> Path:
        """Where the tokens of all texts are kept."""
        chosen = self.cache_dir or os.environ.get("MEGALR_CACHE")
        return (Path(chosen).expanduser() if chosen else _default_cache()) / "tokens"


def _default_cache() -> Path:
    """Nothing is written to find out, so that all processes of a node have the same answer."""
    folder = Path("~/.cache/megalr").expanduser()
    there = next(each for each in (folder, *folder.parents) if os.path.lexists(each))
    effective = os.access in os.supports_effective_ids  # else root's rights count, also where it has given them up
    if there == folder or (there.is_dir() and os.access(there, os.W_OK | os.X_OK, effective_ids=effective)):
        return folder
    other = Path(tempfile.gettempdir(), f"megalr-{os.getuid()}")
    return folder if other.exists() and distrust(other) else other
