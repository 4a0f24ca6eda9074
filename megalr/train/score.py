"""The scoring program: held-out perplexity, or scores of lm_eval, of a run, a checkpoint or an exported model."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megalr.checkpoint.export.weights import Weights
from megalr.checkpoint.folders import latest, listed, newest_whole, read_or_offer
from megalr.checkpoint.manifest import Manifest, check_same
from megalr.data import Data, DataConfig, load_data, load_tokenizer
from megalr.data.sources import refuse_configuration, refuse_text_column, training_source
from megalr.data.tokenizer import EMBEDDED_TOKENIZER, digest_of_tokenizer
from megalr.errors import UserError, in_short, some_of
from megalr.flags import PlainParser, nonempty, positive
from megalr.layers import parametrize
from megalr.plugins import load_plugins
from megalr.train.arguments import add_plugins, add_text
from megalr.train.checkpoints import TOKENIZER, differences, notes_of, text_of
from megalr.train.console import Screen
from megalr.train.evaluation import evaluate
from megalr.train.harness import (
    TaskRequest,
    add_tasks,
    check_installed,
    check_tasks,
    run_tasks,
    task_request,
    write_results,
)
from megalr.train.models import build_model, config_of, entries_of, fit_to_text
from megalr.train.ranks import Ranks
from megalr.train.run_settings import RunSettings, read_settings
from megalr.train.runner import run_program
from megalr.train.unseen_text import check_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_DEFAULT_MICRO_BATCH = 8
_PADDED = 1024  # more entries than a vocabulary is padded with
_NOT_SCORED = "Nothing was scored"
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
        plugins: modules or files to import; those that the folder names are not.
        tasks: lm_eval's, to score instead of the held-out text; None for that.
    """

    model: str
    text: dict[str, Any]
    micro_batch_size: int | None
    galore_compatible_eval: bool
    verbose: bool
    plugins: tuple[str, ...] = ()
    tasks: TaskRequest | None = None


@dataclass(frozen=True)
class Scored:
    """A model, and what it is scored with unless the flags say otherwise.

    Attributes:
        model: of transformers.
        text, micro_batch_size: what it is scored with.
        notes: which weights these are, in lines.
        trained_on: digests of the text and the tokenizer, as far as they are known.
        is_run: ``text`` is what the model was trained on and evaluated with; not known of an export.
    """

    model: Any
    text: DataConfig
    micro_batch_size: int
    notes: tuple[str, ...]
    trained_on: dict[str, str] = field(default_factory=dict)
    is_run: bool = False


def main(argv: Sequence[str]) -> int:
    """Run ``megalr evaluate``; returns the exit code."""
    return run_program(argv, parse_score_arguments, score)


def parse_score_arguments(argv: Sequence[str]) -> ScoreArguments:
    """Read the flags.

    Raises:
        UserError: an unknown flag, a missing or a bad value.
    """
    parser = PlainParser(
        prog="evaluate.py",
        description="Print the held-out perplexity of a run, of one of its checkpoints, or of an exported model. With "
        "--tasks: its scores on tasks of lm-evaluation-harness.",
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
    add_plugins(parser)
    add_tasks(parser.add_argument_group("tasks", "Of lm-evaluation-harness (`pip install lm-eval accelerate`)."))
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
        plugins=tuple(values["plugins"]),
        tasks=task_request(values, text),
    )


def score(arguments: ScoreArguments, ranks: Ranks) -> None:
    """Load, score, print.

    Raises:
        UserError: nothing there to score, or a text that does not fit.
    """
    if ranks.world_size > 1:
        raise UserError("evaluation runs in one process: start it without a launcher, as in `megalr evaluate DIR`")
    load_plugins(arguments.plugins)
    manager = None
    if arguments.tasks is not None:
        check_installed()
        manager = check_tasks(arguments.tasks)
    folder = Path(arguments.model).expanduser()
    changes = {k: v[0] if isinstance(v, list) and len(v) == 1 else v for k, v in arguments.text.items()}
    found = load_scored(folder, tokenizer=changes.get("tokenizer"))
    text = replace(found.text, **changes)
    refuse_configuration(text, changes.get("dataset_config"))
    if "text_column" in changes:  # what the run was trained with may be for its own text alone
        refuse_text_column(text)
    tokenizer = load_tokenizer(text.tokenizer, say=print)
    notes = _check_tokenizer(found, tokenizer, folder, text.tokenizer, chosen="tokenizer" in changes)
    fit_to_text(found.model.config, tokenizer, text.sequence_length)
    print("\n".join([*found.notes, *notes]))
    if arguments.tasks is not None:
        results = run_tasks(
            arguments.tasks,
            manager,
            found.model.to(ranks.device),
            tokenizer,
            batch_size=arguments.micro_batch_size or found.micro_batch_size,
            longest=text.sequence_length,
        )
        print(write_results(results, arguments.tasks, _results_folder(folder), found.notes))
        return
    data = _load_text(found, text, tokenizer, changes, ranks)
    lines = check_text(found.text, found.trained_on, data, changes, tokenizer, folder) if found.is_run else []
    print("\n".join([*data.description.splitlines()[1:], *lines]))
    model, screen = found.model.to(ranks.device), Screen(enabled=True)
    for kind, examples in (("held-out", data.evaluation), ("test", data.test)):
        if examples is None:
            continue
        micro = arguments.micro_batch_size or found.micro_batch_size
        screen.start_bar(0, examples.predicted)
        result = evaluate(model, examples, micro_batch_size=micro, ranks=ranks, advance=screen.advance_by)
        screen.end_bar()
        assert result is not None  # nobody asked it to give up
        print(f"{kind} perplexity {result.perplexity:,.2f} (loss {result.loss:.4f}, {result.tokens:,} tokens)")
        if arguments.galore_compatible_eval:
            print(f"  as published code computes it {result.galore_compatible:,.2f}")


def _load_text(
    found: Scored, text: DataConfig, tokenizer: PreTrainedTokenizerFast, changes: dict[str, Any], ranks: Ranks
) -> Data:
    """The text to be scored; where the run's own is gone, what to write says so."""
    try:
        return load_data(text, tokenizer, rank=0, barrier=ranks.barrier)
    except UserError as error:
        gone = found.is_run and "dataset" not in changes and _what_is_gone(found.text)
        if not gone:
            raise
        raise UserError(
            f"the text that the run was trained on cannot be read: {gone}. {_NOT_SCORED}. If it lies elsewhere now, "
            "name it with --dataset. If there is none any more, write --eval-dataset and the text to be scored, and "
            "--dataset and any other text: that is scored, with a warning, since the run may have read it"
        ) from error


def _what_is_gone(text: DataConfig) -> str:
    """Why the training text cannot be found; empty if it can."""
    try:
        training_source(text)
    except UserError as error:
        return str(error)
    return ""


def _results_folder(folder: Path) -> Path:
    """Where scores are written: not among a checkpoint's files, which have to be as they were saved."""
    return folder.absolute().parent.parent if folder.absolute().parent.name == "checkpoints" else folder


def load_scored(folder: Path, *, tokenizer: str | None = None) -> Scored:
    """The model in ``folder``, whichever of the three kinds it is; all of its weights have been checked.

    Args:
        folder: a run's, a checkpoint's, or an exported model's.
        tokenizer: that the user has named, if so; an export that has none needs it.

    Raises:
        UserError: it is none of them, or is damaged, or newer weights are.
    """
    try:
        os.listdir(folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be read as a folder: {error.strerror}") from error
    if os.path.isfile(folder / "run.json"):
        return _from_checkpoint(folder, *_newest(folder))
    run = folder.absolute().parent.parent
    if os.path.isfile(run / "run.json") and folder.absolute().parent.name == "checkpoints":
        return _from_checkpoint(run, read_or_offer(folder, folder, _NOT_SCORED), [])
    if os.path.isfile(folder / "config.json"):
        return _from_export(folder, tokenizer)
    raise UserError(f"{folder} is no run (run.json), no checkpoint of one, and no exported model (config.json)")


def _newest(run: Path) -> tuple[Manifest, list[str]]:
    """A run's newest checkpoint, which must be whole, and which others cannot be read."""
    directory = run / "checkpoints"
    others, named = listed(directory), latest(directory)  # before all else: a run that goes on writes newer ones
    manifest, skipped = newest_whole(directory)
    newer = [each.folder.name for each in others if each.manifest and each.manifest.order > manifest.order]
    unread = [each.folder.name for each in others if each.manifest is None]
    if newer or named in unread:
        raise UserError(
            "\n  ".join([f"the newest checkpoint of {run} is damaged:", *skipped])
            + f"\n{_NOT_SCORED}. The newest that is whole is {manifest.folder.name}: to have that one scored, name "
            f"{manifest.folder}"
        )
    missing = named is not None and all(each.folder.name != named for each in others)
    gone = [f"`latest` names {named}, which is not there"] if missing else []
    return manifest, [*(f"passed over: {line}" for line in skipped), *gone]


def _from_checkpoint(run: Path, manifest: Manifest, notes: list[str]) -> Scored:
    settings = read_settings(run)
    _check_same_run(settings, manifest)
    config = settings.deepspeed
    weights = Weights(manifest)
    model: Any = build_model(config_of(settings.model, weights), seed=0)
    parametrize(model, weights.parametrization)  # nothing else of a folder's JSON, which may name plugins
    try:
        model.load_state_dict(weights.state_dict())
    except RuntimeError as error:  # names of weights, and their shapes
        raise UserError(f"{manifest.folder} is of another model than {settings.path} describes: {error}") from error
    check_same(manifest)
    _check_finite(model, manifest.folder)
    for section, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if (config.get(section) or {}).get("enabled"):
            for parameter in model.parameters():  # buffers stay fp32, as DeepSpeed leaves them
                parameter.data = parameter.data.to(dtype)
    title = f"{manifest.folder} ({manifest.updates:,} updates)"
    return Scored(model, settings.text, settings.micro_batch_size, (*notes, title), text_of(manifest), is_run=True)


def _check_same_run(settings: RunSettings, manifest: Manifest) -> None:
    """Refuse a ``run.json`` that has come from elsewhere: the weights might fit it, and mean something else there."""
    saved = notes_of(manifest).required
    section = settings.deepspeed.get("megalr") or {}
    now = {
        "model": {key: settings.model.get(key) for key in saved.get("model") or {}},
        "megalr.parametrization": section.get("parametrization"),
    }
    found = differences({key: saved.get(key) for key in now}, now)
    if found:
        raise UserError(
            f"{settings.path} is not of the run that has written {manifest.folder} (checkpoint -> run.json):\n"
            + "\n".join(f"  {line}" for line in found)
        )


def _from_export(folder: Path, tokenizer: str | None) -> Scored:
    has_one = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    if not has_one and tokenizer is None:
        raise UserError(
            f"{folder} has no tokenizer (tokenizer.json), and with another one than in training every model scores "
            "badly: write --tokenizer and the one that it was trained with. That of a run without --tokenizer is "
            f"{EMBEDDED_TOKENIZER}"
        )
    model = _read_export(folder)
    text = DataConfig(tokenizer=str(folder) if has_one else None)
    own: dict[str, str] = {}
    if has_one and tokenizer is not None:
        with contextlib.suppress(UserError):  # to name another is the cure
            own = {TOKENIZER: digest_of_tokenizer(load_tokenizer(str(folder)))}
    return Scored(model, text, _DEFAULT_MICRO_BATCH, (str(folder),), own)


def _read_export(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    # No code that comes with the folder, no pickle, and nothing that it names elsewhere.
    inert: Any = {"trust_remote_code": False, "use_safetensors": True, "local_files_only": True}
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="sdpa", dtype="auto", output_loading_info=True, **inert
        )
    except Exception as error:  # transformers, safetensors and torch raise errors of many kinds
        raise UserError(
            f"{folder} cannot be read as a model without code or pickles that come with it: {in_short(error)}. "
            "evaluate.py reads models that transformers itself knows, with their weights in safetensors. If files are "
            "cut or missing, write the export again"
        ) from error
    wrong = [
        f"{kind.removesuffix('_keys')}: {some_of(sorted(map(str, report[kind])))}"
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if report.get(kind)
    ]
    if wrong:
        raise UserError(
            f"the weights in {folder} are not those of the model that its config.json describes ({'; '.join(wrong)}): "
            "write the export again"
        )
    _check_finite(model, folder)
    return model


def _check_finite(model: Any, folder: Path) -> None:
    wrong = [name for name, tensor in model.named_parameters() if not torch.isfinite(tensor).all()]
    if wrong:
        raise UserError(f"{folder} has weights that are not finite: {', '.join(wrong[:3])}. {_NOT_SCORED}")


def _check_tokenizer(
    found: Scored, tokenizer: PreTrainedTokenizerFast, folder: Path, name: str | None, *, chosen: bool
) -> Sequence[str]:
    """Refuse a tokenizer that is not the model's, as far as that is seen; of one that the user has chosen, say it.

    Args:
        found: the model, whose configuration has the special tokens of the tokenizer that it was trained with.
        tokenizer: to score it with.
        folder, name: the model's and the tokenizer's, for the message.
        chosen: by the user.
    """
    notes, config = [], found.model.config
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    wrong = None
    if ends != [None] and tokenizer.eos_token_id not in ends:
        wrong = (
            f"the model in {folder} has the end-of-text token {', '.join(map(str, ends))}, the tokenizer "
            f"{tokenizer.eos_token_id}: it is not the one that the model was trained with"
        )
    elif TOKENIZER in found.trained_on and found.trained_on[TOKENIZER] != digest_of_tokenizer(tokenizer):
        wrong = (
            f"the tokenizer {name or EMBEDDED_TOKENIZER} is not the one that the model in {folder} was trained "
            "with, or has changed since"
        )
    if wrong is not None:
        if not chosen:
            raise UserError(f"{wrong}. Write --tokenizer and that one")
        notes.append(wrong)
    entries = entries_of(tokenizer)
    if config.vocab_size - entries >= _PADDED:
        notes.append(f"the model's vocabulary has {config.vocab_size:,} entries, the tokenizer's {entries:,}")
    return notes
