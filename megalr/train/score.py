"""The scoring program: held-out perplexity of a run, of one of its checkpoints, or of an exported model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from megalr.checkpoint.export.weights import Weights
from megalr.checkpoint.folders import newest_whole
from megalr.checkpoint.manifest import Manifest, read_manifest
from megalr.data import DataConfig, load_data, load_tokenizer
from megalr.errors import UserError
from megalr.flags import PlainParser, nonempty, positive
from megalr.train.arguments import add_text
from megalr.train.evaluation import evaluate
from megalr.train.models import build_model, config_from_dict, fit_to_text
from megalr.train.ranks import Ranks
from megalr.train.runner import run_program

_DEFAULT_MICRO_BATCH = 8
_TEXT_FLAGS = (
    "dataset",
    "dataset_config",
    "eval_dataset",
    "tokenizer",
    "text_column",
    "sequence_length",
    "pack",
    "max_train_tokens",
    "max_eval_tokens",
    "test_half",
)


@dataclass(frozen=True, kw_only=True)
class ScoreArguments:
    """What the user asked for.

    Attributes:
        model: a run's folder, a checkpoint's, or an exported model's.
        text: the text flags that were given, by their name in :class:`~megalr.data.DataConfig`.
        micro_batch_size: sequences at a time; None for what the run trained with.
        galore_compatible_eval: show that perplexity, too.
        verbose: show what the libraries log.
    """

    model: str
    text: dict[str, Any]
    micro_batch_size: int | None
    galore_compatible_eval: bool
    verbose: bool


@dataclass(frozen=True)
class Scored:
    """A transformers model, and the text and batch that it is scored with unless the flags say otherwise."""

    model: Any
    text: DataConfig
    micro_batch_size: int


def main(argv: Sequence[str]) -> int:
    """Run ``launchers/evaluate.py``; returns the exit code."""
    return run_program(argv, parse_score_arguments, score)


def parse_score_arguments(argv: Sequence[str]) -> ScoreArguments:
    """Read the flags.

    Raises:
        UserError: an unknown flag, a missing or a bad value.
    """
    parser = PlainParser(
        prog="evaluate.py",
        description="Held-out perplexity of a run, of one of its checkpoints, or of an exported model.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "model",
        type=nonempty,
        metavar="FOLDER",
        help="a run's folder (its latest checkpoint), a folder under its checkpoints, or an exported Hugging "
        "Face model",
    )
    parser.add_argument(
        "--micro-batch-size", type=positive, metavar="N", help="sequences at a time (default: the run's)"
    )
    parser.add_argument(
        "--galore-compatible-eval",
        action="store_true",
        help="print the perplexity as published code computes it, too; it is lower",
    )
    parser.add_argument("--verbose", action="store_true", help="show what DeepSpeed and transformers log")
    group = parser.add_argument_group("text", "For a run, its own text is the default.")
    add_text(group)
    group.set_defaults(**dict.fromkeys(_TEXT_FLAGS))
    values = vars(parser.parse_args(argv))
    text = {name: values[name] for name in _TEXT_FLAGS if values[name] is not None}
    return ScoreArguments(
        model=values["model"],
        text=text,
        micro_batch_size=values["micro_batch_size"],
        galore_compatible_eval=values["galore_compatible_eval"],
        verbose=values["verbose"],
    )


def score(arguments: ScoreArguments, ranks: Ranks) -> None:
    """Load, score, print.

    Raises:
        UserError: nothing there to score, or a text that does not fit.
    """
    if ranks.world_size > 1:
        raise UserError("evaluate.py runs in one process: start it with `python launchers/evaluate.py`")
    folder = Path(arguments.model).expanduser()
    found = load_scored(folder)
    changes = {k: v[0] if isinstance(v, list) and len(v) == 1 else v for k, v in arguments.text.items()}
    text = replace(found.text, **changes)
    tokenizer = load_tokenizer(text.tokenizer)
    fit_to_text(found.model.config, tokenizer, text.sequence_length)
    data = load_data(text, tokenizer, rank=0, barrier=ranks.barrier)
    print("\n".join(data.description.splitlines()[1:]))
    model = found.model.to(ranks.device)
    for kind, examples in (("held-out", data.evaluation), ("test", data.test)):
        if examples is None:
            continue
        micro = arguments.micro_batch_size or found.micro_batch_size
        result = evaluate(model, examples, micro_batch_size=micro, ranks=ranks)
        assert result is not None  # nobody asked it to give up
        print(f"{kind} perplexity {result.perplexity:,.2f} (loss {result.loss:.4f}, {result.tokens:,} tokens)")
        if arguments.galore_compatible_eval:
            print(f"  as published code computes it {result.galore_compatible:,.2f}")


def load_scored(folder: Path) -> Scored:
    """The model in ``folder``, whichever of the three kinds it is.

    Raises:
        UserError: it is none of them.
    """
    if (folder / "run.json").is_file():
        return _from_checkpoint(folder, newest_whole(folder / "checkpoints")[0])
    if (folder.parent.parent / "run.json").is_file() and folder.parent.name == "checkpoints":
        return _from_checkpoint(folder.parent.parent, read_manifest(folder))
    if (folder / "config.json").is_file():
        return _from_export(folder)
    raise UserError(f"{folder} is no run (run.json), no checkpoint of one, and no exported model (config.json)")


def _from_checkpoint(run: Path, manifest: Manifest) -> Scored:
    from megalr import parametrize  # noqa: PLC0415

    settings = json.loads((run / "run.json").read_text())
    config = settings["deepspeed"]
    model: Any = build_model(config_from_dict(settings["model"]), seed=0)
    parametrize(model, config)
    model.load_state_dict(Weights(manifest).state_dict())
    for section, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if (config.get(section) or {}).get("enabled"):
            for parameter in model.parameters():  # buffers stay fp32, as DeepSpeed leaves them
                parameter.data = parameter.data.to(dtype)
    known = {field.name for field in fields(DataConfig)}
    text = {key: value for key, value in settings["data"].items() if key in known}
    return Scored(model, DataConfig(**text), config["train_micro_batch_size_per_gpu"])


def _from_export(folder: Path) -> Scored:
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa", dtype="auto")
    text = DataConfig(tokenizer=str(folder) if (folder / "tokenizer.json").is_file() else None)
    return Scored(model, text, _DEFAULT_MICRO_BATCH)
