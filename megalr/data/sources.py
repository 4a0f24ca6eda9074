"""Where documents come from: the embedded novels, local files, or the hub (``hub.py``)."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megalr.data.config import DataConfig
from megalr.data.documents import Piece
from megalr.data.files import copies_among, local_files
from megalr.data.hub import HubText
from megalr.data.readers import read_file, suffix
from megalr.errors import UserError

AUSTEN = "austen"
AUSTEN_FOLDER = Path(__file__).parent / "austen"
HELD_OUT_NOVEL = "persuasion.txt"

_NOT_A_HUB_NAME = (
    ".txt",
    ".jsonl",
    ".json",
    ".parquet",
    ".gz",
    ".zst",
    ".xz",
    ".zip",
    ".csv",
    ".tsv",
    ".md",
    ".html",
)
_HASHED_BYTES = 1 << 28  # below this much text the cache is keyed by its content, above by path, size and time


class Source(Protocol):
    """A text, read from its start as often as needed."""

    @property
    def label(self) -> str:
        """A few words for the reader."""

    def identity(self) -> dict[str, Any]:
        """JSON values that differ when the text differs; the key of the token cache."""

    def pieces(self) -> Iterator[Piece]:
        """All documents, in order."""


@dataclass(frozen=True)
class LocalText:
    """Local files: a .txt file is one document, a line of JSONL or a row of Parquet is one document."""

    files: tuple[Path, ...]
    label: str
    text_column: str = "text"
    left_out: str = ""  # what a folder or a pattern stands for beside these files, in words

    def identity(self) -> dict[str, Any]:
        """Content hashes; path, size and time where hashing more than 256 MiB would take long.

        Raises:
            UserError: a file cannot be read.
        """
        try:
            return self._identity()
        except OSError as error:
            raise UserError(f"cannot read {error.filename}: {error.strerror}") from error

    def pieces(self) -> Iterator[Piece]:
        """All documents, in order.

        Raises:
            UserError: a file that cannot be read, is not UTF-8, or lacks the text column.
        """
        for file in self.files:
            yield from read_file(file, self.text_column)

    def _identity(self) -> dict[str, Any]:
        stats = [file.stat() for file in self.files]
        if sum(stat.st_size for stat in stats) <= _HASHED_BYTES:
            marks: list[Any] = [hashlib.sha256(file.read_bytes()).hexdigest() for file in self.files]
        else:
            marks = [[str(file), stat.st_size, stat.st_mtime_ns] for file, stat in zip(self.files, stats, strict=True)]
        kinds = [suffix(file) for file in self.files]
        return {"local": marks, "kinds": kinds, "text_column": self.text_column}


def training_source(config: DataConfig) -> Source:
    """The text to train on.

    Raises:
        UserError: nothing there, or of a kind that cannot be read.
    """
    return _source(config.dataset, config, "train")


def evaluation_source(config: DataConfig) -> Source | None:
    """The held-out text where it is a text of its own, None where it is to be split from the training text.

    Raises:
        UserError: nothing there, of a kind that cannot be read, or a file that is also trained on.
    """
    if config.eval_dataset is None:
        if config.dataset == AUSTEN or is_hub_dataset(config.dataset):
            return _source(config.dataset, config, "validation", optional=True)
        return None
    held_out = _source(config.eval_dataset, config, "validation")
    for file, other in files_in_both(held_out, training_source(config)).items():
        if file.resolve() == other.resolve():
            raise UserError(
                f"{file.resolve()} is both in the training and in the held-out text; take it out of one of "
                "them, or leave the held-out text out to hold back the end of the training text"
            )
        raise UserError(
            f"{file} of the held-out text holds byte for byte what {other} of the training text does: take "
            "one of them out, since a model is not judged by what it was trained on"
        )
    return held_out


def files_in_both(text: Source, other: Source) -> dict[Path, Path]:
    """The files of one text that the other has, too, and what they are there: the same file, a link or a copy.

    Raises:
        UserError: a file that cannot be read.
    """
    if not isinstance(text, LocalText) or not isinstance(other, LocalText):
        return {}
    places = {file.resolve(): file for file in other.files}
    same = {file: places[file.resolve()] for file in text.files if file.resolve() in places}
    rest = [file for file in text.files if file not in same]
    copies = copies_among([*other.files, *rest])
    return same | {file: copies[file] for file in rest if file in copies and copies[file] in other.files}


def refuse_configuration(config: DataConfig, given: str | None) -> None:
    """Refuse the name of a hub dataset's part where no text is one of the hub.

    Args:
        config: the texts.
        given: the part's name as the user has written it; None if not.

    Raises:
        UserError: says so.
    """
    texts = (config.dataset, *([] if config.eval_dataset is None else [config.eval_dataset]))
    if given is not None and not any(map(is_hub_dataset, texts)):
        named = [config.dataset] if isinstance(config.dataset, str) else config.dataset
        raise UserError(
            f"--dataset-config {given} is for a dataset of the hub, and the text is {', '.join(named)}: leave it out"
        )


def refuse_text_column(config: DataConfig) -> None:
    """Refuse a column of another name where all texts are plain ones, which have none.

    Raises:
        UserError: says so; or a text is not there.
    """
    if config.text_column == DataConfig.text_column:
        return
    sources = [source for source in (training_source(config), evaluation_source(config)) if source is not None]
    if all(isinstance(source, LocalText) and _is_plain(source) for source in sources):
        labels = ", ".join(source.label for source in sources)
        raise UserError(
            f"--text-column {config.text_column} is for JSONL, Parquet and datasets of the hub, and the text is "
            f"{labels}: leave it out"
        )


def is_hub_dataset(dataset: str | Sequence[str]) -> bool:
    """Whether ``dataset`` names a hub dataset rather than the embedded novels or local files."""
    names = [dataset] if isinstance(dataset, str) else list(dataset)
    return len(names) == 1 and names[0] != AUSTEN and not is_local(names[0])


def is_local(name: str) -> bool:
    """Whether a name among several, or one that is not the embedded text's, stands for local files, there or not."""
    path = Path(name).expanduser()
    looks_like_a_path = any(mark in name for mark in "*?[") or name.startswith((".", "/", "~", "\\"))
    return (
        path.exists()
        or looks_like_a_path
        or path.suffix.lower() in _NOT_A_HUB_NAME
        or re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is None
    )


def _source(dataset: str | Sequence[str], config: DataConfig, split: str, optional: bool = False) -> Source:
    names = [dataset] if isinstance(dataset, str) else list(dataset)
    if not names:
        raise UserError(f'no {split} text was named; write "{AUSTEN}", a local file, or a hub dataset')
    if names == [AUSTEN]:
        novels = sorted(AUSTEN_FOLDER.glob("*.txt"))
        chosen = [novel for novel in novels if (novel.name == HELD_OUT_NOVEL) == (split != "train")]
        return LocalText(tuple(chosen), AUSTEN if split == "train" else HELD_OUT_NOVEL)
    if is_hub_dataset(names):
        return HubText(names[0], config.dataset_config, split, config.text_column, optional)
    for name in names:
        if not is_local(name):
            raise UserError(
                f'"{name}" is no local file or folder; the embedded text and hub datasets stand alone, '
                "only local files can be listed together"
            )
    files, left_out = local_files(names)
    label = str(files[0]) if len(files) == 1 else f"{len(files)} files of {', '.join(names)}"
    return LocalText(tuple(files), label, config.text_column, left_out)


def _is_plain(text: LocalText) -> bool:
    return all(suffix(file) == ".txt" for file in text.files)
