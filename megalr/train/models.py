"""The model of a run: a LLaMA from a small JSON file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megalr.checkpoint.export.weights import Weights, check_model
from megalr.config.text import read
from megalr.data.tokenizer import largest_token
from megalr.errors import UserError, printable, some_of
from megalr.layers import parametrize
from megalr.schema import slip

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# Keys of a model's JSON that say how large it is.
SIZES = (
    "head_dim",
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "model_type",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "vocab_size",
)
_OPTIONAL = ("head_dim", "num_key_value_heads")
_LARGEST = 1 << 31  # of a matrix's rows and columns


def read_model_config(name: str, folder: Path) -> LlamaConfig:
    """The shape that ``name`` stands for.

    Args:
        name: a file in ``folder`` without its ending, or the path of a Hugging Face ``config.json``.
        folder: where the named shapes are.

    Raises:
        UserError: no such file, not JSON, or no LLaMA.
    """
    from transformers import LlamaConfig  # noqa: PLC0415  (slow to import)

    path = Path(name).expanduser()
    if not os.path.isfile(path):  # Path.is_file raises for names that are too long
        path = folder / f"{name}.json"
    if not os.path.isfile(path):
        known = ", ".join(sorted(file.stem for file in folder.glob("*.json"))) or "none"
        raise UserError(f"there is no model called {name}: write the path of a JSON file, or one of {known}")
    content = read(path)
    if content.get("model_type", "llama") != "llama":
        raise UserError(f'{path} describes no LLaMA; it needs "model_type": "llama", see {folder} for examples')
    _check_shape(content, path)
    try:
        return _with_own_code(LlamaConfig(**content))
    except Exception as error:  # transformers validates with errors of several kinds
        raise UserError(f"{path} is no valid LLaMA configuration: {error}") from error


def _check_shape(content: dict[str, Any], path: Path) -> None:
    """Refuse sizes that are none, and slips in their names, for which transformers would take its default."""
    for key in content:
        meant = None if key in SIZES else slip(key, SIZES)
        if meant is not None:
            raise UserError(f'{path} has a key "{key}"; did you mean "{meant}"?')
    for key in SIZES:
        value = content.get(key, 1)
        optional = value is None and key in _OPTIONAL
        if not optional and key != "model_type" and (type(value) is not int or not 1 <= value <= _LARGEST):
            raise UserError(f"{path}: {key} is {json.dumps(value)}; write a whole number of at least 1")


def fit_to_text(config: LlamaConfig, tokenizer: PreTrainedTokenizerFast, sequence_length: int) -> None:
    """Check that the model can read the text, and give it the tokenizer's special tokens, in place.

    Raises:
        UserError: a vocabulary that lacks tokens which a text can have, or a sequence longer than the model's.
    """
    entries = entries_of(tokenizer)
    if config.vocab_size < entries:
        raise UserError(
            f"the model's vocabulary has {config.vocab_size:,} entries, the tokenizer's {entries:,}: "
            f"write a vocab_size of at least {entries} in the model's JSON, or choose another "
            "tokenizer"
        )
    if sequence_length > config.max_position_embeddings:
        raise UserError(
            f"--sequence-length is {sequence_length}, but the model reads at most "
            f"{config.max_position_embeddings} tokens: write a shorter one, or a larger "
            "max_position_embeddings in the model's JSON"
        )
    config.bos_token_id = tokenizer.bos_token_id
    config.eos_token_id = tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id


def entries_of(tokenizer: PreTrainedTokenizerFast) -> int:
    """How many entries of a vocabulary a text can have."""
    # The paper's models have 32,000 entries for T5's tokenizer, whose last 100 are marks that no text contains.
    return 1 + largest_token(tokenizer)


def empty_model(config: LlamaConfig) -> LlamaForCausalLM:
    """The dense model on the meta device: shapes without numbers."""
    from transformers import LlamaForCausalLM  # noqa: PLC0415

    try:
        with torch.device("meta"):
            return LlamaForCausalLM(config)
    except (RuntimeError, ValueError, ZeroDivisionError) as error:  # e.g. a negative width
        raise UserError(f"the model's JSON describes no LLaMA that can be built: {error}") from error


def build_model(config: LlamaConfig, *, seed: int, activation_checkpointing: bool = False) -> LlamaForCausalLM:
    """A dense fp32 model on the CPU; its random weights follow from ``seed`` alone, so ranks agree."""
    from transformers import LlamaForCausalLM  # noqa: PLC0415

    config.use_cache = False
    torch.manual_seed(seed)
    kind: Any = LlamaForCausalLM  # transformers leaves these methods untyped
    model = kind._from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    if activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    built: LlamaForCausalLM = model
    return built


def config_from_dict(values: dict[str, Any]) -> LlamaConfig:
    """The inverse of ``config.to_dict()``.

    Raises:
        UserError: it is no LLaMA's.
    """
    from transformers import LlamaConfig  # noqa: PLC0415

    try:
        config: LlamaConfig = LlamaConfig.from_dict(values)
    except Exception as error:  # transformers validates with errors of several kinds
        raise UserError(f"the model's configuration is no LLaMA's: {error}") from error
    return _with_own_code(config)


def config_of(values: dict[str, Any], weights: Weights) -> LlamaConfig:
    """A configuration whose model has just these weights, found out before one is built: it may ask for any size.

    Raises:
        UserError: it is of another model.
    """
    check_model(values, weights.manifest)
    config = config_from_dict(values)
    outline = parametrize(empty_model(config), weights.parametrization).state_dict()
    expected = {name: tuple(tensor.shape) for name, tensor in outline.items()}
    found = {name: weights.shape(name) for name in (*weights, *weights.aliases)}
    wrong = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
    if wrong:
        changes = [f"{printable(name)}: {found.get(name, 'none')} -> {expected.get(name, 'none')}" for name in wrong]
        raise UserError(
            f"{weights.manifest.folder} is of another model than its run's configuration describes (checkpoint -> "
            f"configuration): {some_of(changes)}"
        )
    return config


def _with_own_code(config: LlamaConfig) -> LlamaConfig:
    """A configuration may name an attention kernel of the hub, which transformers would fetch and run."""
    config._attn_implementation = "sdpa"
    return config
