"""The folder that a model is written to: nothing in it is replaced before all new files are on the disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from megalr.checkpoint.manifest import MANIFEST
from megalr.errors import UserError

PART = ".part"
ADAPTERS, BASE = "adapter_config.json", "base"  # as megalr.checkpoint.export.adapters writes them
# Files that mark a folder as an earlier export, and files of an earlier export that must not stay beside a new one.
MARKS = ("config.json", "model.safetensors", ADAPTERS)
REPLACED = (
    *("model*.safetensors*", "pytorch_model*", "adapter_*", "config.json", "generation_config.json"),
    # As save_pretrained writes them: with another model's tokenizer a model scores badly, and nothing else shows it.
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
)
OVERWRITE = "add --overwrite to replace an export there"

# Shows how a tokenizer treats case, accents, numbers, spaces and line breaks.
_PROBE = "Emma's 1,816 novels  (Été, naïve) \n\tÉLAN: x86_64, 東京 ﬁn! "


def check_output(
    out: Path,
    *,
    may_replace: bool,
    flag: str = "",
    checkpoint: Path | None = None,
    otherwise: str = OVERWRITE,
) -> None:
    """Refuse a folder that an export must not be written to.

    Args:
        out: where the export is to be.
        may_replace: whether an earlier export may be there.
        flag: the flag that names the folder, for error messages.
        checkpoint: what is exported, if it is one.
        otherwise: what else the user can do where there is an export, for error messages.

    Raises:
        UserError: it is a file, or not empty, or not an export, or of a checkpoint.
    """
    shown = f"{flag} {out}".strip()
    if out.exists() and not out.is_dir():
        raise UserError(f"{shown} is a file: name a folder to write to")
    inside = checkpoint is not None and checkpoint.resolve() in (out.resolve(), *out.resolve().parents)
    if inside or (out / MANIFEST).exists():
        raise UserError(f"{shown} is, or is in, a checkpoint: name a folder elsewhere to write to")
    if not out.is_dir() or all(path.name == PART for path in out.iterdir()):
        return
    if not may_replace:
        raise UserError(f"{shown} is not empty: name another folder, or {otherwise}")
    if not any((out / mark).is_file() for mark in MARKS):
        raise UserError(f"{shown} holds something else than an export, which --overwrite does not replace")


@contextmanager
def output_folder(out: Path) -> Iterator[Path]:
    """An empty folder to write to. At the end its files are moved to ``out``, and those of an earlier export removed.

    Args:
        out: where the export is to be; made if it is not there. See :func:`check_output`.

    Raises:
        UserError: it cannot be written.
    """
    made = not out.exists()
    part = out / PART
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        yield part
        _move(part, out)
    except (OSError, SafetensorError) as error:  # safetensors makes its own of a full disk
        raise UserError(f"{out} cannot be written: {error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
        if made and out.is_dir() and not any(out.iterdir()):
            out.rmdir()


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save one of transformers beside a model, for :func:`output_folder`, and check what AutoTokenizer reads there.

    Raises:
        OSError: it cannot be written.
        UserError: what is read there is another tokenizer, as classes of transformers build their own anew.
    """
    from transformers import AutoTokenizer  # noqa: PLC0415  (slow to import)

    try:
        tokenizer.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:
        # The tokenizers library raises this class itself of a full disk, and nothing narrower.
        if type(error) is not Exception:
            raise
        raise OSError(f"the tokenizer cannot be saved: {error}") from error
    try:
        found = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        changed = [key for key, value in _seen_of(tokenizer).items() if _seen_of(found)[key] != value]
    except Exception as error:  # of many kinds
        changed = [f"it cannot be read: {error}"]
    if changed:
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path} is another one when AutoTokenizer has loaded what was saved of it "
            f"({', '.join(changed)}): {type(tokenizer).__name__} builds it anew. Name a tokenizer.json with "
            "--tokenizer, which is used as it is"
        )


def _seen_of(tokenizer: Any) -> dict[str, Any]:
    """What a program sees of a tokenizer; keys are for messages."""
    ids = tokenizer.encode(_PROBE, add_special_tokens=False)
    specials = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")
    return {
        "tokens of a text": ids,
        "marks around a text": tokenizer.encode(_PROBE),
        "text of tokens": tokenizer.decode(ids),
        **{name: getattr(tokenizer, name) for name in specials},
        "padding_side": tokenizer.padding_side,
        "chat_template": tokenizer.chat_template,
    }


def _move(part: Path, out: Path) -> None:
    # The base model that an earlier export of adapters has beside them; any other folder there is the user's own.
    earlier = (out / ADAPTERS).is_file()
    for folder in (out, out / BASE) if earlier else (out,):
        for pattern in REPLACED:
            for stale in folder.glob(pattern):
                if stale.is_file():
                    stale.unlink()
    for path in sorted(part.rglob("*")):
        place = out / path.relative_to(part)
        if path.is_dir():
            place.mkdir(exist_ok=True)
        else:
            os.replace(path, place)
