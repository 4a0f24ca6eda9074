"""TensorBoard, W&B, Comet and CSV files: the packages they need, and what they call the numbers of ``metrics.jsonl``.

All four get the same names. The x axis of a monitor is the number of sequences read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megalr.disk import named
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
    "lr": "Train/Samples/lr",
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
OURS_ALONE = (NAMES["lr"],)  # which DeepSpeed writes, too, of the next update, and after each
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


def continue_files(place: Path, sequences: int, run: Path) -> list[str]:
    """Make CSV files ready for a run that is resumed: without rows that lie beyond, and with one header.

    Files outside the run's folder may be of several runs, and stay as they are.

    Args:
        place: their folder.
        sequences: how many the run has read.
        run: the run's folder.

    Returns:
        Names of files that have a header, without ".csv".

    Raises:
        OSError: a file cannot be read or written.
    """
    within = run.resolve() in (place.resolve(), *place.resolve().parents)
    files = [path for path in place.glob("*.csv") if path.is_file()]
    return [path.stem for path in files if _continue_file(path, sequences if within else None)]


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


def _continue_file(path: Path, sequences: int | None) -> bool:
    """Cut one file; whether it is a monitor's, with its header. Where ``sequences`` is None it is left as it is."""
    with named(path), path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        header = file.readline().strip()
        safe = header.removeprefix("step,").replace(" ", "_")
        if not header.startswith("step,") or not f"_{path.stem}".endswith(f"_{safe}"):
            return False
        if sequences is None:
            return True
        lines = [line.strip() for line in file if line.endswith("\n")]
    rows: list[tuple[float, str]] = []
    begins = False
    for line in lines:
        begins = begins or line == header
        step = _step(line)
        if step is None or step > sequences:
            continue
        if begins:  # a run went on here, perhaps after an older checkpoint than its last row
            rows = [row for row in rows if row[0] < step]
            begins = False
        rows.append((step, line))
    part = path.with_name(f".{path.name}.part")
    with named(part), part.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        file.writelines(f"{row}\r\n" for row in (header, *(line for _, line in rows)))  # as the monitor ends its lines
    os.replace(part, path)
    return True


def _step(line: str) -> float | None:
    """The x of a row; None for a header, and for what a full disk has left of a row."""
    try:
        step, _ = map(float, line.split(","))
    except ValueError:
        return None
    return step


def _numbers(text: str) -> tuple[int, ...]:
    """A version's, to be compared."""
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])
