"""TensorBoard, W&B, Comet and CSV files: the packages they need, and what they call the numbers of ``metrics.jsonl``.

All four get the same names. DeepSpeed writes ``Train/Samples/lr``, the rate of the first group, itself. The x axis of a
monitor is the number of sequences read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from megalr.errors import UserError

# By section of the JSON: the module that the monitor imports, what pip calls it, the lowest version DeepSpeed takes.
PACKAGES = {
    "tensorboard": ("tensorboard", "tensorboard", ""),
    "wandb": ("wandb", "wandb", ""),
    "comet": ("comet_ml", "comet_ml", "3.41.0"),
}

# Keys of a row -> names. A key whose value is an object stands for one number for each of its keys.
NAMES = {
    "loss": "Train/Samples/train_loss",
    "grad_norm": "Train/Samples/grad_norm",
    "learning_rates": "Train/Samples/lr_{}",
    "tokens": "Train/Samples/tokens",
    "epoch": "Train/Samples/epoch",
    "tokens_per_second": "Train/Samples/tokens_per_second",
    "tokens_per_second_per_rank": "Train/Samples/tokens_per_second_per_rank",
    "tflops_per_rank": "Train/Samples/tflops_per_rank",
    "mfu": "Train/Samples/mfu",
    "seconds": "Train/Samples/seconds_{}",
    "exchange_bytes": "Train/Samples/exchange_bytes",
    "memory_bytes": "Train/Samples/memory_bytes",
    "peak_memory_bytes": "Train/Samples/peak_memory_bytes",
    "eval_loss": "Eval/Samples/loss",
    "eval_perplexity": "Eval/Samples/perplexity",
    "eval_perplexity_galore_compatible": "Eval/Samples/perplexity_galore_compatible",
}
NOT_OF_EVALUATIONS = ("tokens", "epoch")  # a monitor has them from the training rows


def monitor_numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row by the names that monitors get; what is null is left out.

    Args:
        row: of ``metrics.jsonl``, of a step or of an evaluation.
    """
    found: dict[str, float] = {}
    for key, name in NAMES.items():
        value = None if "eval_loss" in row and key in NOT_OF_EVALUATIONS else row.get(key)
        if isinstance(value, Mapping):
            found |= {name.format(part): number for part, number in value.items() if number is not None}
        elif value is not None:
            found[name] = value
    return found


def check_monitors(config: Mapping[str, Any]) -> None:
    """Refuse a monitor whose package is not installed, as DeepSpeed does, but before anything is read.

    To be called where monitors write, on the first rank.

    Args:
        config: the JSON.

    Raises:
        UserError: names the package.
    """
    for section, (module, package, least) in PACKAGES.items():
        given = config.get(section)
        if not isinstance(given, Mapping) or given.get("enabled") is not True:
            continue
        found = find_spec(module)
        # A folder of that name is a module, too: W&B writes into one called "wandb".
        if found is None or found.origin is None:
            state = "is not installed"
        elif least and _numbers(version(package)) < _numbers(least):
            state = f"is installed as {version(package)}"
        else:
            continue
        wanted = f"'{package}>={least}'" if least else package
        raise UserError(
            f'the JSON enables "{section}", which needs the package {package}, and that {state}: '
            f'run `pip install {wanted}`, or write "enabled": false'
        )


def _numbers(text: str) -> tuple[int, ...]:
    """A version's, to be compared."""
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])
