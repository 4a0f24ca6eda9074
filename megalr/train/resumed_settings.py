"""Which settings a run that is resumed has to share with its checkpoint, and which are said where they differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megalr.agreement import OWN
from megalr.config.secrets import without_secrets
from megalr.train.checkpoints import differences
from megalr.train.ds_config import Resolved
from megalr.train.ranks import Ranks

if TYPE_CHECKING:
    from transformers import LlamaConfig

# What of a model's configuration may differ without its being another model.
_COSMETIC_KEYS = (
    "architectures",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "initializer_range",
    "pad_token_id",
    "transformers_version",
    "use_cache",
    "_name_or_path",
)
_FURTHER = "further"  # among a checkpoint's settings: keys of its JSON that have no name of their own there
EVALUATED = "evaluated_sequences"  # among them, too: how many the evaluations on the way read; no setting of the user's
_NAMED = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "optimizer",
    "scheduler",
    "gradient_clipping",
    "megalr",
    "tensor_parallel",
)
# Where things lie and how they are saved.
_NO_NUMBERS = (
    "activation_checkpointing",
    "aio",
    "checkpoint",
    "elasticity",
    "timers",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
)
# The other keys of "zero_optimization" say where things lie and when they are sent.
_ZERO_NUMBERS = (
    "offload_optimizer",
    "offload_param",
    "zenflow",
    "zero_quantized_gradients",
    "zero_quantized_nontrainable_weights",
    "zero_quantized_weights",
    "zeropp_loco_param",
)


def settings_of(resolved: Resolved, model: LlamaConfig, ranks: Ranks) -> tuple[dict[str, Any], dict[str, Any]]:
    """What has to be the same in a run that continues this one, and what is worth a word where it is not."""
    config = resolved.config
    section = config.get("megalr") or {}
    optimizer = config.get("optimizer") or {}
    params = optimizer.get("params") or {}
    fp16 = bool((config.get("fp16") or {}).get("enabled", False))
    required = {
        "train_batch_size": resolved.batch.total,
        "model": {key: value for key, value in model.to_dict().items() if key not in _COSMETIC_KEYS},
        "megalr.parametrization": section.get("parametrization"),
    }
    noted = {
        "processes": ranks.world_size,
        "tensor_parallel.autotp_size": ranks.tensor_parallel,
        "zero_optimization.stage": (config.get("zero_optimization") or {}).get("stage", 0),
        "precision": "bf16" if resolved.bf16 else "fp16" if fp16 else "fp32",
        "train_micro_batch_size_per_gpu": resolved.batch.micro,
        "steps": resolved.steps,
        "optimizer": {"type": optimizer.get("type"), **params},
        "scheduler": config.get("scheduler"),
        "gradient_clipping": config.get("gradient_clipping"),
        "megalr": {key: value for key, value in section.items() if key != "parametrization"},
        _FURTHER: further_settings(config),
    }
    return required, noted


def further_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a DeepSpeed JSON that may change numbers and are not noted by a name of their own.

    What is switched off, null or empty is left out, as if it were not written; so are keys and passwords.
    """
    rest = {key: value for key, value in config.items() if key not in (*OWN, *_NAMED, *_NO_NUMBERS)}
    zero = rest.get("zero_optimization") or {}
    rest["zero_optimization"] = {key: value for key, value in zero.items() if key in _ZERO_NUMBERS}
    found = _written(without_secrets(rest))
    for name in ("bf16", "fp16"):  # "precision" says which
        found.get(name, {}).pop("enabled", None)
    return found


def evaluated_before(before: Mapping[str, Any]) -> int | None:
    """How many sequences the evaluations on the way have read, by what a checkpoint has noted; older ones have not."""
    found = before.get(EVALUATED)
    return found if isinstance(found, int) and not isinstance(found, bool) else None


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A line for each setting that differs.

    Args:
        before: what a checkpoint has noted; older ones have none of :func:`further_settings`.
        now: what :func:`settings_of` notes.
    """
    further = now[_FURTHER]
    own = (_FURTHER, EVALUATED)
    named, noted = ({key: value for key, value in each.items() if key not in own} for each in (before, now))
    return differences(named, noted) + differences(before.get(_FURTHER, further), further)


def _written(section: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for key, value in section.items():
        inner = value
        if isinstance(value, Mapping):
            inner = {} if value.get("enabled") is False else _written(value)
        if inner not in (None, False, {}):
            found[key] = inner
    return found
