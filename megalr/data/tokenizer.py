"""Loading a tokenizer: the embedded one, a file, a folder, or one of the hub."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megalr.data.hub import LOCAL_OPTIONS, connection_problem
from megalr.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

EMBEDDED_TOKENIZER = Path(__file__).parent / "austen" / "tokenizer.json"
END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"

# Shows how a tokenizer treats case, accents, numbers, spaces and line breaks.
_PROBE = "Emma's 1,816 novels  (Été, naïve) \n\tÉLAN: x86_64, 東京 ﬁn! "

_END_NAMES = (END_OF_TEXT, "</s>", "<eos>", "<|end_of_text|>", "<|im_end|>", "[SEP]")
_PAD_NAMES = (PAD, "<pad>", "[PAD]", "<|finetune_right_pad_id|>")


def load_tokenizer(name: str | None, *, say: Callable[[str], None] = lambda line: None) -> PreTrainedTokenizerFast:
    """A fast tokenizer with an end-of-text and a padding token, which adds nothing that training does not show.

    Args:
        name: None for the embedded 4,096-entry byte-level BPE; the path of a ``tokenizer.json``; a folder
            that ``save_pretrained`` wrote or that holds a ``tokenizer.json``; or a hub name such as
            "t5-base".
        say: gets a line where the tokenizer is not used as it was found.

    A tokenizer without a padding token pads with its end-of-text token (labels know the pads by position, not
    by id).

    Training separates documents by the end-of-text token alone. A model that never saw the beginning-of-text token
    which the tokenizer puts before a text would score that text's first words badly. With an end-of-text token behind
    a prompt it would begin another text. So such tokens are taken out of the tokenizer, which is also the one that is
    exported. An end-of-text token before a text stays: it is what training shows there.

    Raises:
        UserError: not found, not readable, not a fast tokenizer, or without an end-of-text token.
    """
    tokenizer = _load(name)
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer {name} has no end-of-text token, which separates documents; add one of "
            f"{', '.join(_END_NAMES)} to its special tokens"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    untrained = _untrained_marks(tokenizer)
    if untrained:
        tokenizer = _without_marks(tokenizer)
        say(
            f"the tokenizer {name} marks a text with {' '.join(untrained)}. Training has {tokenizer.eos_token} alone, "
            "between documents. An export gets a tokenizer without these marks; use that one, because "
            "with the original the model reads other tokens than it was trained on"
        )
    return tokenizer


def digest_of_tokenizer(tokenizer: PreTrainedTokenizerFast) -> str:
    """What tells one tokenizer from another: its entries, special tokens, and what it makes of a short text.

    Not of its file, which another version of the library writes otherwise.
    """
    entries = sorted(tokenizer.get_vocab().items())
    probe = tokenizer.encode(_PROBE, add_special_tokens=False)
    state = [entries, tokenizer.eos_token_id, tokenizer.pad_token_id, probe]
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()


def largest_token(tokenizer: PreTrainedTokenizerFast) -> int:
    """The largest id that a text, its end or its padding can become, added tokens included."""
    return int(max(set(tokenizer.get_vocab().values()) - unused_marks(tokenizer)))


def unused_marks(tokenizer: PreTrainedTokenizerFast) -> set[int]:
    """Special tokens that no text is turned into, such as T5's sentinels: all but those that every model has."""
    used = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id)
    return set(tokenizer.all_special_ids) - set(used)


def _untrained_marks(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Names of the tokens that are put before a text and are not the end-of-text token, or are put behind it."""
    encoding = tokenizer.backend_tokenizer.encode("a")
    places = list(zip(encoding.ids, encoding.special_tokens_mask, encoding.attention_mask, strict=True))
    attended = [(token, special) for token, special, mask in places if mask]  # padding is not attended to
    first = next((place for place, (_, special) in enumerate(attended) if not special), len(attended))
    before = [token for token, _ in attended[:first]]
    before += [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    behind = [token for token, special in attended[first:] if special]
    untrained = dict.fromkeys([*(token for token in before if token != tokenizer.eos_token_id), *behind])
    return [str(tokenizer.convert_ids_to_tokens(token)) for token in untrained]


def _without_marks(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same tokenizer, of no model's class: most of these put their own marks around a text whenever they load."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    named = {name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    named["bos_token"] = str(tokenizer.eos_token)  # generation without a prompt starts with it
    build: Any = PreTrainedTokenizerFast  # its constructor has no annotations
    plain: PreTrainedTokenizerFast = build(
        tokenizer_object=tokenizer.backend_tokenizer,
        name_or_path=tokenizer.name_or_path,
        **named,
        extra_special_tokens=list(tokenizer.extra_special_tokens),
        chat_template=tokenizer.chat_template,
        model_max_length=tokenizer.model_max_length,
        padding_side=tokenizer.padding_side,
        truncation_side=tokenizer.truncation_side,
        clean_up_tokenization_spaces=tokenizer.clean_up_tokenization_spaces,
        split_special_tokens=tokenizer.split_special_tokens,
        model_input_names=["input_ids", "attention_mask"],  # some classes add token_type_ids, which no LLaMA takes
    )
    backend: Any = plain.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B")
    return plain


def _load(name: str | None) -> PreTrainedTokenizerFast:
    if name is None:
        return _from_file(EMBEDDED_TOKENIZER)
    path = Path(name).expanduser()
    if path.is_file():
        return _from_file(path)
    if path.is_dir():
        strange = next((file for file in _files_in(path) if not file.is_file()), None)
        if strange is not None:  # transformers would do without it
            raise UserError(f"{strange} is no file: write the folder of the tokenizer {name} again")
        if (path / "tokenizer_config.json").exists():
            return _from_pretrained(str(path), local=True)
        if (path / "tokenizer.json").exists():
            return _from_file(path / "tokenizer.json")
        raise UserError(f"the folder {name} holds no tokenizer.json")
    if name.startswith((".", "/", "~")) or path.suffix == ".json":
        raise UserError(
            f"there is no tokenizer file or folder called {name}; write the path of a tokenizer.json, a hub "
            "name, or nothing for the embedded tokenizer"
        )
    return _from_pretrained(name, local=False)


def _files_in(folder: Path) -> list[Path]:
    """What says how a folder's tokenizer works, as far as it is there."""
    files = (folder / name for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"))
    return [file for file in files if os.path.lexists(file)]


def _from_file(path: Path) -> PreTrainedTokenizerFast:
    """A tokenizer.json does not say which special token is which, so they are known by their usual names."""
    from transformers import PreTrainedTokenizerFast

    try:
        added = json.loads(path.read_text(encoding="utf-8")).get("added_tokens", [])
        present = {token["content"] for token in added}
        end = next((token for token in _END_NAMES if token in present), None)
        pad = next((token for token in _PAD_NAMES if token in present), None)
        build: Any = PreTrainedTokenizerFast  # its constructor has no annotations
        tokenizer: PreTrainedTokenizerFast = build(
            tokenizer_file=str(path), bos_token=end, eos_token=end, pad_token=pad
        )
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise UserError(f"{path} is not a tokenizer.json of the tokenizers library: {error}") from error
    return tokenizer


def _from_pretrained(name: str, *, local: bool) -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    problem = None if local else connection_problem()
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, local_files_only=local or problem is not None, trust_remote_code=False
        )
    except Exception as error:  # missing, gated, broken, offline: one message for all
        reason = problem or str(error).strip()
        where = "in the folder" if local else "on the hub (nor is there a file or folder of that name)"
        raise UserError(f"cannot load the tokenizer {name} {where}: {reason}. {LOCAL_OPTIONS}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(
            f"the tokenizer {name} has no fast version, which tokenizing a whole text needs; convert it to a "
            "tokenizer.json first"
        )
    return tokenizer
