"""A run is scored on text that it was not trained on, or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megalr.data import Data, DataConfig, load_data
from megalr.data.overlap import repeated, tokens_trained_on
from megalr.data.tokenizer import digest_of_tokenizer
from megalr.errors import UserError
from megalr.train.checkpoints import HELD_OUT, TOKENIZER

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_CUTTING_FLAGS = ("dataset", "eval_dataset", "max_train_tokens", "max_eval_tokens")  # that choose what is held out


def check_text(
    own_text: DataConfig,
    digests: Mapping[str, str],
    data: Data,
    changes: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
) -> list[str]:
    """Refuse to score what the run was trained on, whatever the flags say, and a text that has changed since.

    Args:
        own_text: what the run was trained on and evaluated with.
        digests: of that, as the checkpoint has them.
        data: what is to be scored.
        changes: the flags about the text, by their name in :class:`~megalr.data.DataConfig`.
        tokenizer: of what is to be scored.
        folder: the run's, for the message.

    Returns:
        What to say of the text, in lines.

    Raises:
        UserError: says how much of the text was trained on, or that the text has changed; and what to write.
    """
    own, problem = _own_data(own_text, digests, changes, tokenizer)
    if own is None:  # the flags name another text, or there would be nothing to score
        return [
            f"WARNING: the text that the run was trained on cannot be read ({problem}): whether this one was among it "
            "is not known"
        ]
    same_tokenizer = "tokenizer" not in changes or digests.get(TOKENIZER) == digest_of_tokenizer(tokenizer)
    if same_tokenizer and "eval_dataset" not in changes and _is_another_text(digests, own):
        raise UserError(
            f"the held-out text is not the one that the run in {folder} was evaluated on: what its run.json names "
            f"(dataset {own_text.dataset}, eval_dataset {own_text.eval_dataset}, tokenizer {own_text.tokenizer}) has "
            "changed since, or is missing in part. Nothing was scored. To score a text that the run has not read, "
            "name it with --eval-dataset"
        )
    training, judged = own.spans[0], data.spans[1]
    known = tokens_trained_on(training, judged)
    if known:
        flags = " and ".join(f"--{name.replace('_', '-')}" for name in changes if name in _CUTTING_FLAGS)
        raise UserError(
            f"{known:,} of the {len(judged):,} tokens to be scored are text that the run in {folder} was trained on, "
            f"and a model is not judged by that. Nothing was scored. Leave out {flags or 'that text'} for the "
            f"{len(own.spans[1]):,} tokens that the run has held out, or name a text that it has not read with "
            "--eval-dataset"
        )
    return [line for line in (repeated(training, judged),) if line]


def _own_data(
    own_text: DataConfig, digests: Mapping[str, str], changes: Mapping[str, Any], tokenizer: PreTrainedTokenizerFast
) -> tuple[Data | None, str]:
    """The run's own text, cut as in training; from where ``--dataset`` says that it is now if it has moved there.

    Returns:
        None if it cannot be read, and why.
    """
    own, problem = None, ""
    try:
        own = load_data(own_text, tokenizer, rank=0, barrier=lambda: None)
    except UserError as error:
        problem = str(error)
    recorded = HELD_OUT in digests or "data" in digests
    if recorded and "dataset" in changes and (own is None or _is_another_text(digests, own)):
        names = {name: value for name, value in changes.items() if name in ("dataset", "dataset_config")}
        try:
            moved = load_data(replace(own_text, **names), tokenizer, rank=0, barrier=lambda: None)
        except UserError:  # one that is cut otherwise
            return own, problem
        if not _is_another_text(digests, moved):
            return moved, ""
    return own, problem


def _is_another_text(digests: Mapping[str, str], data: Data) -> bool:
    """Whether a run's own text is no longer what it was; the held-out one if that is known."""
    if HELD_OUT in digests:
        return digests[HELD_OUT] != data.evaluation.fingerprint
    return digests.get("data", data.train.fingerprint) != data.train.fingerprint
