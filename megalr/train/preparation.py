"""Everything that is read, decided and refused before the first weight exists."""

from __future__ import annotations

import glob
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from megalr.agreement import code_facts, digest_of_files, json_facts
from megalr.config.secrets import secrets_in, without_secrets
from megalr.config.settings import MegalrConfig, read_json
from megalr.data import Data, DataConfig, load_data, load_tokenizer
from megalr.data.overlap import repeated
from megalr.data.sources import (
    AUSTEN,
    evaluation_source,
    is_local,
    refuse_configuration,
    refuse_text_column,
    training_source,
)
from megalr.data.tokenizer import digest_of_tokenizer
from megalr.errors import UserError
from megalr.hosts import check_config
from megalr.hosts.autotp import check_tensor_parallel, tensor_parallel_size
from megalr.layers import parametrize
from megalr.layers.velora import compress_activations
from megalr.locks import FolderLock
from megalr.optim.groups import parameter_groups
from megalr.train.arguments import (
    DEFAULT_BATCH_SIZE,
    DEFAULT_STEPS,
    LARGEST_DEFAULT_MICRO_BATCH,
    PretrainArguments,
)
from megalr.train.checkpoints import Notes, Resumable, check_notes, find_checkpoint
from megalr.train.console import Screen
from megalr.train.ds_config import Request, Resolved, resolve
from megalr.train.export import check_export_folder
from megalr.train.models import empty_model, fit_to_text, read_model_config
from megalr.train.monitors import check_monitors
from megalr.train.quiet import hide
from megalr.train.ranks import Ranks
from megalr.train.resumed_settings import changed_settings, settings_of
from megalr.train.run_folder import RunFolder, take_run_folder

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedTokenizerFast


MOST_EPOCHS = 4  # up to which repeated text is nearly as good as new text: Muennighoff et al. 2023, arXiv 2305.16264


class Sizes(Protocol):
    """Sizes as they were asked for; None stands for the JSON's or the default."""

    @property
    def batch_size(self) -> int | None:
        """Sequences of an update."""

    @property
    def micro_batch_size(self) -> int | None:
        """Sequences of one pass on one process."""

    @property
    def steps(self) -> int | None:
        """Updates."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run is going to do.

    Attributes:
        arguments: the flags.
        ranks: this process among the others, and who shares layers.
        resolved: the DeepSpeed JSON without "auto".
        megalr: its typed view.
        folder: where the run is written.
        checkpoint: to go on from, if any.
        tokenizer, data_config, data, model: what is read by what.
        required, noted: settings to keep with checkpoints, see :class:`~megalr.train.checkpoints.Notes`.
    """

    arguments: PretrainArguments
    ranks: Ranks
    resolved: Resolved
    megalr: MegalrConfig
    folder: RunFolder
    checkpoint: Resumable | None
    tokenizer: PreTrainedTokenizerFast
    data_config: DataConfig
    data: Data
    model: LlamaConfig
    required: dict[str, Any]
    noted: dict[str, Any]


def make_plan(
    arguments: PretrainArguments, ranks: Ranks, models_folder: Path, screen: Screen, lock: FolderLock
) -> Plan:
    """Read everything, decide everything, refuse what cannot work. Collective.

    Nothing is written but the cache of tokens and the lock.

    Args:
        arguments: the flags.
        ranks: this process among the others.
        models_folder: where the named model shapes are.
        screen: gets a line for each choice that was not the user's.
        lock: takes the run's folder on the first rank.

    Raises:
        UserError: for whatever the user can mend, on all ranks.
    """
    with ranks.together():
        content = read_json(arguments.deepspeed)
        hide(secrets_in(content))
    ranks.agree({**code_facts(), **json_facts(without_secrets(content)), **_flags(arguments)})
    with ranks.together():
        model = read_model_config(arguments.model or _default_model(ranks), models_folder)
        shared_by = tensor_parallel_size(content)
        check_tensor_parallel(model, shared_by, ranks.world_size)
    ranks.agree(json_facts(model.to_dict(), "--model: "))
    with ranks.together():
        ranks = replace(ranks, tensor_parallel=shared_by)
        resolve(content, _request(arguments, model, ranks))  # its complaints come before those about folders and text
        if arguments.export is not None and ranks.is_first:
            check_export_folder(arguments.export, may_replace=arguments.overwrite, resumes=arguments.resume)
    folder, checkpoint, finished = ranks.from_first(lambda: _folder_and_checkpoint(arguments, lock))
    for line in checkpoint.skipped if checkpoint is not None else ():
        screen.say(f"passed over: {line}")
    if arguments.resume and checkpoint is None:
        screen.say(f"the run in {folder.path} has no checkpoint yet: it begins anew")
    with ranks.together():
        resolved = resolve(content, _request(arguments, model, ranks, output=str(folder.path)))
        megalr = MegalrConfig.from_json(resolved.config)
        check_config(resolved.config, ranks.data_size)
        if ranks.is_first:
            check_monitors(resolved.config)
        if arguments.export is not None and megalr.parametrization.not_dense:
            raise UserError(
                f'--export writes dense weights, and "{megalr.parametrization.type}" layers have none, because '
                f"{megalr.parametrization.not_dense}: leave it out; checkpoints hold the layers as they are"
            )
        if arguments.export is not None:
            _check_apart(Path(arguments.export).expanduser(), folder)
        # To hear their complaints before a run is deleted.
        shapes = parametrize(empty_model(model), megalr.parametrization)
        parameter_groups(shapes, megalr.optimizer)
        if megalr.activations is not None:
            compress_activations(shapes, megalr.activations)
        for line in resolved.notes:
            screen.say(line)
        required, noted = settings_of(resolved, model, ranks)
        if checkpoint is not None:
            _check_resumable(checkpoint.notes, required, noted, resolved, folder, screen, finished=finished)
    ranks.from_first(lambda: _fetch_tokenizer(arguments.tokenizer))
    with ranks.together():
        tokenizer = load_tokenizer(arguments.tokenizer, say=screen.say)
        fit_to_text(model, tokenizer, arguments.sequence_length)
    ranks.agree({"the tokenizer": digest_of_tokenizer(tokenizer)[:12]})
    with ranks.together():
        text = data_config(arguments, resolved.seed)
        data = load_data(text, tokenizer, rank=ranks.local_rank, barrier=ranks.barrier)
    texts = {"training": data.train, "held-out": data.evaluation}
    ranks.agree({f"tokens of the {name} text": each.fingerprint for name, each in texts.items()}, lambda: _files(text))
    warning = ranks.from_first(lambda: repeated(*data.spans))
    screen.say("\n".join(filter(None, (data.description, warning))))
    screen.say(how_often(data, resolved.steps * resolved.batch.total))
    return Plan(
        arguments=arguments,
        ranks=ranks,
        resolved=resolved,
        megalr=megalr,
        folder=folder,
        checkpoint=checkpoint,
        tokenizer=tokenizer,
        data_config=text,
        data=data,
        model=model,
        required=required,
        noted=noted,
    )


def request_for(
    sizes: Sizes, model: LlamaConfig, *, seed: int | None, world_size: int, on_gpu: bool, output: str = "."
) -> Request:
    """What "auto" is resolved from: sizes that were asked for, the model, the processes, the program's defaults."""
    return Request(
        world_size=world_size,
        bf16_is_fast=on_gpu and torch.cuda.is_bf16_supported(including_emulation=False),
        batch_size=sizes.batch_size,
        micro_batch_size=sizes.micro_batch_size,
        steps=sizes.steps,
        seed=seed,
        default_batch_size=DEFAULT_BATCH_SIZE,
        default_steps=DEFAULT_STEPS,
        largest_micro_batch=LARGEST_DEFAULT_MICRO_BATCH,
        default_rank=max(1, model.hidden_size // 4),
        output=output,
    )


def data_config(arguments: PretrainArguments, seed: int) -> DataConfig:
    """What the flags say of the text; seed: of the order of its examples."""

    def one_or_many(names: tuple[str, ...]) -> str | tuple[str, ...]:
        if names == (AUSTEN,):
            return AUSTEN
        names = tuple(_absolute(name) if is_local(name) else name for name in names)
        return names[0] if len(names) == 1 else names

    tokenizer = arguments.tokenizer
    if tokenizer is not None and Path(tokenizer).expanduser().exists():
        tokenizer = _absolute(tokenizer)
    config = DataConfig(
        dataset=one_or_many(arguments.dataset),
        dataset_config=arguments.dataset_config,
        eval_dataset=None if arguments.eval_dataset is None else one_or_many(arguments.eval_dataset),
        text_column=arguments.text_column,
        tokenizer=tokenizer,
        sequence_length=arguments.sequence_length,
        pack=arguments.pack,
        seed=seed,
        max_train_tokens=arguments.max_train_tokens,
        max_eval_tokens=arguments.max_eval_tokens,
        test_half=arguments.test_half,
    )
    refuse_configuration(config, arguments.dataset_config)
    refuse_text_column(config)
    return config


def _absolute(name: str) -> str:
    """A file's, folder's or pattern's name, since run.json keeps it and the run may be scored from another folder."""
    path = Path(name).expanduser()
    return str(path.absolute() if path.exists() else Path(glob.escape(os.getcwd())) / path)


def how_often(data: Data, sequences: int) -> str:
    """How many times a run of so many sequences reads its text, and what to change where that is too often."""
    epochs = sequences / len(data.train)
    tokens = data.train.tokens
    words = f"the run reads {round(epochs * tokens):,} tokens: {epochs:,.2f} epochs of {tokens:,} training tokens"
    if epochs <= MOST_EPOCHS:
        return words
    more = "a longer --dataset"
    if data.limit is not None:
        more = f"a larger --max-train-tokens, which cuts the text at {data.limit:,}"
    return (
        f"{words}\nWARNING: the text is read {epochs:,.1f} times, and what is read more than {MOST_EPOCHS} times "
        f"teaches less and less. To read it less often, write {more}, or fewer --steps"
    )


def _flags(arguments: PretrainArguments) -> dict[str, str]:
    """The flags that all ranks need to have alike; the JSON's place may be another on another node."""
    own = ("deepspeed", "verbose")
    return {f"--{name.replace('_', '-')}": str(value) for name, value in asdict(arguments).items() if name not in own}


def _files(config: DataConfig) -> dict[str, str]:
    """The files of the texts, where these are local."""
    sources = (training_source(config), evaluation_source(config))
    files = [file for source in sources for file in getattr(source, "files", ())]
    return {f"the file {file}": digest_of_files([file]) for file in files}


def _default_model(ranks: Ranks) -> str:
    return "60m" if ranks.device.type == "cuda" else "tiny"


def _request(arguments: PretrainArguments, model: LlamaConfig, ranks: Ranks, output: str = ".") -> Request:
    on_gpu = ranks.device.type == "cuda"
    return request_for(arguments, model, seed=arguments.seed, world_size=ranks.data_size, on_gpu=on_gpu, output=output)


def _folder_and_checkpoint(arguments: PretrainArguments, lock: FolderLock) -> tuple[RunFolder, Resumable | None, bool]:
    """The run's folder; the checkpoint to go on from, if it is to go on; whether it is finished."""
    name = Path(arguments.deepspeed).stem
    asked = {"resume": arguments.resume, "overwrite": arguments.overwrite}
    folder = take_run_folder(name, arguments.output, **asked, lock=lock)
    # What a run has written before its first checkpoint is written again.
    checkpoint = find_checkpoint(folder) if arguments.resume and not folder.has_only_begun else None
    return folder, checkpoint, folder.summary.exists()


def _check_apart(export: Path, folder: RunFolder) -> None:
    """Refuse an export among the files of the run."""
    places = (export.resolve(), *export.resolve().parents)
    if export.resolve() == folder.path.resolve() or any(path.resolve() in places for path in folder.written):
        raise UserError(f"--export {export} is where the run itself is written: name another folder")


def _fetch_tokenizer(name: str | None) -> None:
    """On one rank before the others, so that a tokenizer of the hub is downloaded once."""
    load_tokenizer(name)


def _check_resumable(
    notes: Notes,
    required: dict[str, Any],
    noted: dict[str, Any],
    resolved: Resolved,
    folder: RunFolder,
    screen: Screen,
    *,
    finished: bool,
) -> None:
    check_notes(notes, required, folder)
    if notes.step > resolved.steps or (notes.step == resolved.steps and finished):
        raise UserError(
            f"the run in {folder.path} is finished: its checkpoint is of step {notes.step:,} of "
            f"{resolved.steps:,}. To train it further, write a larger --steps"
        )
    screen.say(f"resuming {folder.path} after step {notes.step:,}")
    changed = changed_settings(notes.settings, noted)
    if changed:
        screen.say("with other settings than before:\n" + "\n".join(f"  {line}" for line in changed))
