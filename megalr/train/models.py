"""The model of a run: a LLaMA from a small JSON file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megalr.checkpoint.export.weights import Weights, check_model
from megalr.data.tokenizer import largest_token
from megalr.errors import UserError, printable
from megalr.layers import parametrize

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


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
    if not path.is_file():
        path = folder / f"{name}.json"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in folder.glob("*.json"))) or "none"
        raise UserError(f"there is no model called {name}: write the path of a JSON file, or one of {known}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict) or content.get("model_type", "llama") != "llama":
        raise UserError(f'{path} describes no LLaMA; it needs "model_type": "llama", see {folder} for examples')
    try:
        return _with_own_code(LlamaConfig(**content))
    except Exception as error:  # transformers validates with errors of several kinds
        raise UserError(f"{path} is no valid LLaMA configuration: {error}") from error


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
        some = "; ".join(f"{name}: {found.get(name, 'none')} -> {expected.get(name, 'none')}" for name in wrong[:3])
        raise UserError(
            f"{weights.manifest.folder} is of another model than its run's configuration describes (checkpoint -> "
            f"configuration): {printable(some)}" + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        )
    return config


def _with_own_code(config: LlamaConfig) -> LlamaConfig:
    """A configuration may name an attention kernel of the hub, which transformers would fetch and run."""
    config._attn_implementation = "sdpa"
    return config
