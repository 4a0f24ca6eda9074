"""The pretraining program: from flags and a JSON to a run's folder."""

from __future__ import annotations

import platform
import random
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megalr.config.secrets import without_secrets
from megalr.data import Batches, unigram_perplexity
from megalr.data.tokenizer import digest_of_tokenizer
from megalr.disk import write_and_sync
from megalr.errors import UserError
from megalr.hosts import host_of
from megalr.locks import FolderLock
from megalr.train.arguments import PretrainArguments, parse_arguments
from megalr.train.console import Screen
from megalr.train.evaluation import Evaluation, evaluate, schedule_evaluations
from megalr.train.export import export_dense
from megalr.train.flops import flops_of_update
from megalr.train.interruption import end_at_once_when_asked, exit_code
from megalr.train.lives import FINISHED, KEY, end_life, lives_before, new_life
from megalr.train.loop import Loop, LoopSettings
from megalr.train.meter import Work
from megalr.train.models import build_model
from megalr.train.peaks import peak_of_device
from megalr.train.preparation import Plan, make_plan
from megalr.train.ranks import Ranks
from megalr.train.resumed_settings import EVALUATED, evaluated_before
from megalr.train.run_folder import write_json
from megalr.train.runner import run_program
from megalr.train.summary import Baselines, finish

_VERSIONS_OF = ("torch", "deepspeed", "transformers", "tokenizers", "datasets", "numpy")
_SEQUENCES_TO_COMPARE = 2  # after an export


def main(argv: Sequence[str], *, models_folder: Path) -> int:
    """Run ``launchers/pretrain.py``.

    Args:
        argv: the command line without the program's name.
        models_folder: where the named model shapes are.

    Returns:
        The exit code: 0 at the end, 2 after a user's mistake and where a guard stopped the run; after a request to stop
        75, "try again", or 0 where that was Ctrl-C.
    """
    end_at_once_when_asked()
    return run_program(argv, parse_arguments, lambda arguments, ranks: pretrain(arguments, ranks, models_folder))


def pretrain(arguments: PretrainArguments, ranks: Ranks, models_folder: Path) -> int:
    """Train a model from its start, or on from a checkpoint. Collective.

    Returns:
        The exit code.

    Raises:
        UserError: for whatever the user can mend.
    """
    with FolderLock() as lock:
        return _pretrain(arguments, ranks, models_folder, lock)


def _pretrain(arguments: PretrainArguments, ranks: Ranks, models_folder: Path, lock: FolderLock) -> int:
    screen = Screen(enabled=ranks.is_first)
    plan = make_plan(arguments, ranks, models_folder, screen, lock)
    ranks = plan.ranks
    unigram = ranks.from_first(lambda: _unigram(plan))
    try:
        return _run(plan, ranks, unigram, lock, screen)
    finally:
        if ranks.is_first and lock.is_in_place:
            plan.folder.put_back()  # a run that was to be replaced, where no update has come of it


def _run(plan: Plan, ranks: Ranks, unigram: float, lock: FolderLock, screen: Screen) -> int:
    ranks.from_first(lock.check)  # reading the text may have taken long
    ranks.from_first(lambda: _prepare_folder(plan))
    if plan.checkpoint is None:
        ranks.from_first(lambda: _write_settings(plan, ranks, [], 0))  # first of all: it says that the rest is a run's
    loop = build_loop(plan, ranks, lock, screen)
    if plan.checkpoint is not None:
        last = loop.metrics.last_step()  # before what will be made again is cut
        loop.resume(plan.checkpoint)  # the last that may refuse: a finished run stays as it is until then
        ranks.from_first(lambda: _write_settings(plan, ranks, lives_before(plan.folder.settings, last), loop.step))
    _introduce(plan, loop, ranks, screen)
    how = "interrupted by an error"
    try:
        code, how = _work_through(plan, loop, ranks, unigram, screen)
    except UserError as error:
        how = str(error)
        raise
    finally:
        if ranks.is_first and lock.is_in_place:
            end_life(plan.folder.settings, loop.step, how)
    return code


def _work_through(plan: Plan, loop: Loop, ranks: Ranks, unigram: float, screen: Screen) -> tuple[int, str]:
    """Train and tell; the exit code, and how it has ended."""
    arguments = plan.arguments
    if plan.checkpoint is None:
        loop.evaluate()
    untrained = loop.metrics.untrained_perplexity()
    screen.say(f"unigram model of the training text: held-out perplexity {unigram:,.2f}")
    reason = loop.train()
    if reason is not None:
        here = all(ranks.gather(ranks.rank == ranks.local_rank))
        words = how_to_resume(sys.argv, plan.folder.path, ranks.world_size, on_one_node=here)
        screen.say(
            f"stopped on request ({reason}) after update {loop.step:,}; "
            f"the checkpoint is in {plan.folder.checkpoints}\n{words}"
        )
        return exit_code(reason), reason
    difference = None
    if arguments.export is not None:
        screen.say(f"exporting to {arguments.export}")
        difference = _export(loop.engine, plan, Path(arguments.export).expanduser(), ranks)
    test = _test(loop, plan, ranks)
    loop.check_folder()
    finish(loop, plan, Baselines(untrained=untrained, unigram=unigram), difference, test, ranks, screen)
    return 0, FINISHED


def how_to_resume(argv: Sequence[str], folder: Path, processes: int, *, on_one_node: bool) -> str:
    """A line with the command that goes on with a run.

    Args:
        argv: the words that this process was started with.
        folder: of the run.
        processes: all there are; `megalr pretrain` starts as many, and of other commands so many have to be started.
        on_one_node: whether all are on this one, beyond which `megalr pretrain` starts none.
    """
    words = [word for word in argv if word not in ("--overwrite", "--resume") and "--local_rank" not in word]
    if "--output" not in words and not any(word.startswith("--output=") for word in words):
        words += ["--output", str(folder)]
    if words[:2] == ["megalr", "pretrain"] and on_one_node:
        return f"to go on: {shlex.join([*words[:2], '--processes', str(processes), *words[2:], '--resume'])}"
    number = f"{processes} process{'es' if processes > 1 else ''}"
    return f"to go on, start {number} of: {shlex.join([*words, '--resume'])}"


def build_loop(plan: Plan, ranks: Ranks, lock: FolderLock, screen: Screen) -> Loop:
    """The model, its engine and everything the loop needs. Collective."""
    import megalr  # noqa: PLC0415  (it brings DeepSpeed, whose chatter has to be silenced first)

    resolved, arguments = plan.resolved, plan.arguments
    random.seed(resolved.seed)
    np.random.seed(resolved.seed % 2**32)
    model = build_model(plan.model, seed=resolved.seed, activation_checkpointing=arguments.activation_checkpointing)
    with ranks.together():
        try:
            engine, *_ = megalr.initialize(model=model, config=resolved.config)
        except UserError:
            raise
        except (AssertionError, ValueError) as error:  # as DeepSpeed says what it cannot do only now
            raise UserError(f"DeepSpeed cannot make an engine of this configuration: {error}") from error
    optimizer = host_of(engine).optimizer
    table = optimizer.routing_table()
    ranks.from_first(lock.check)
    ranks.from_first(lambda: write_and_sync(plan.folder.routing, f"{table}\n"))
    screen.say(table if arguments.verbose else optimizer.summary())
    batches = Batches(
        plan.data.train,
        micro_batch_size=resolved.batch.micro,
        accumulation_steps=resolved.batch.accumulation,
        rank=ranks.data_rank,
        world_size=ranks.data_size,
        seed=resolved.seed,
    )
    before = None if plan.checkpoint is None else evaluated_before(plan.checkpoint.notes.settings)
    evaluations = schedule_evaluations(
        arguments.eval_every,
        plan.data.evaluation,
        batch=resolved.batch.total,
        steps=resolved.steps,
        before=before,
    )
    if before is None and arguments.eval_every is None:
        before = len(evaluations.examples)
    settings = LoopSettings(
        steps=resolved.steps,
        batch=resolved.batch,
        evaluations=evaluations,
        save_every=arguments.save_every,
        log_every=arguments.log_every,
        keep=arguments.keep_checkpoints,
        profile=arguments.profile,
        galore_compatible_eval=arguments.galore_compatible_eval,
    )
    return Loop(
        engine,
        batches,
        plan.data.evaluation,
        settings,
        tokenizer=digest_of_tokenizer(plan.tokenizer),
        work=ranks.from_first(lambda: _work(plan, ranks, host_of(engine).dtypes[0])),
        ranks=ranks,
        folder=plan.folder,
        lock=lock,
        screen=screen,
        required=plan.required,
        noted=plan.noted if before is None else {**plan.noted, EVALUATED: before},
    )


def _work(plan: Plan, ranks: Ranks, dtype: torch.dtype) -> Work:
    """What an update asks of the devices, as far as it is known."""
    batch, peak = plan.resolved.batch, plan.arguments.peak_tflops
    return Work(
        flops=flops_of_update(
            plan.model,
            plan.megalr,
            sequences=batch.micro,
            passes=batch.accumulation * ranks.data_size,
            sequence_length=plan.arguments.sequence_length,
        ),
        peak_tflops=peak_of_device(ranks.device, dtype) if peak is None else peak,
        ranks=ranks.world_size,
    )


def _unigram(plan: Plan) -> float:
    size = plan.model.vocab_size
    return unigram_perplexity(plan.data.train.token_counts(size), plan.data.evaluation.token_counts(size))


def _test(loop: Loop, plan: Plan, ranks: Ranks) -> Evaluation | None:
    """What the trained model scores on the text that was kept for it, if one was."""
    if plan.data.test is None:
        return None
    return evaluate(loop.engine, plan.data.test, micro_batch_size=plan.resolved.batch.micro, ranks=ranks)


def _prepare_folder(plan: Plan) -> None:
    """Make room; what is cleared is free, had only begun, or the user said --overwrite."""
    if plan.checkpoint is None:
        if plan.arguments.resume:
            plan.folder.keep_metrics()
        if plan.arguments.overwrite and plan.folder.is_taken:
            plan.folder.set_aside()
        plan.folder.clear()
    plan.folder.path.mkdir(parents=True, exist_ok=True)


def _write_settings(plan: Plan, ranks: Ranks, before: list[dict[str, Any]], update: int) -> None:
    """Write ``run.json``.

    Args:
        plan, ranks: the run, and this process.
        before: its lives until now.
        update: the last one they have made.
    """
    lives = [*before, new_life(time.strftime("%Y-%m-%d %H:%M:%S"), ranks.world_size, update)]
    content = {
        "command": shlex.join(word for word in sys.argv if "--local_rank" not in word),  # a launcher's word
        "started": lives[0]["started"],
        KEY: lives,
        "arguments": asdict(plan.arguments),
        "processes": ranks.world_size,
        "device": str(ranks.device),
        "deepspeed": without_secrets(plan.resolved.config),
        "model": plan.model.to_dict(),
        "data": {**asdict(plan.data_config), "fingerprint": plan.data.train.fingerprint},
        "python": platform.python_version(),
        "versions": {name: version(name) for name in _VERSIONS_OF},
    }
    write_json(plan.folder.settings, content)
    plan.folder.summary.unlink(missing_ok=True)  # last: a full disk leaves a finished run as it was


def _introduce(plan: Plan, loop: Loop, ranks: Ranks, screen: Screen) -> None:
    batch = plan.resolved.batch
    cut = f"{ranks.data_size} process{'es' if ranks.data_size > 1 else ''}"
    if ranks.tensor_parallel > 1:
        cut = f"{ranks.data_size} x {ranks.tensor_parallel} tensor-parallel processes"
    cut += f" x {batch.accumulation} accumulation steps" if batch.accumulation > 1 else ""
    screen.say(
        f"model: {loop.parameters:,} parameters, ZeRO stage {host_of(loop.engine).stage}\n"
        f"training: {plan.resolved.steps:,} steps of {batch.total} sequences ({cut} x {batch.micro})\n"
        f"writing to {plan.folder.path}"
    )


def _export(engine: Any, plan: Plan, folder: Path, ranks: Ranks) -> float:
    held_out = plan.data.evaluation
    rows = [held_out[index][0] for index in range(min(_SEQUENCES_TO_COMPARE, len(held_out)))]
    return export_dense(
        engine,
        plan.tokenizer,
        plan.megalr.parametrization,
        torch.stack([torch.from_numpy(row).long() for row in rows]),
        folder,
        dtype=host_of(engine).dtypes[0],
        ranks=ranks,
    )
