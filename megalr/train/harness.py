"""Scores of lm-evaluation-harness (``lm_eval``), where it is installed: ``megalr evaluate DIR --tasks ...``."""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megalr.errors import UserError, in_short
from megalr.flags import nonempty, path, positive
from megalr.train.run_folder import write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NOT_INSTALLED = (
    "--tasks needs lm-evaluation-harness, which is not installed: `pip install lm-eval accelerate`, or "
    '`pip install "megalr[evaluate]"`. Without --tasks you get the held-out perplexity'
)
_WITH_TASKS = ("tokenizer", "sequence_length")  # flags about the text that mean something to a task, too
_BOOTSTRAPS = 1000  # samples for the standard errors; lm_eval's 100,000 take minutes


@dataclass(frozen=True, kw_only=True)
class TaskRequest:
    """What lm_eval is to do.

    Attributes:
        tasks: names of lm_eval's tasks, groups and tags, or of those in ``folder``.
        folder: of task files (``.yaml``) of the user's own, if there are any.
        limit: examples of each task; None for all.
        output: the file to write results to; None for the default.
    """

    tasks: tuple[str, ...]
    folder: Path | None = None
    limit: int | None = None
    output: Path | None = None


def add_tasks(group: argparse._ArgumentGroup) -> None:
    """Declare the flags."""
    group.add_argument(
        "--tasks", type=nonempty, metavar="TASK[,TASK]", help="names of tasks, as `lm_eval ls tasks` lists them"
    )
    group.add_argument("--task-path", type=path, metavar="DIR", help="a folder with .yaml files of tasks of your own")
    group.add_argument("--limit", type=positive, metavar="N", help="the first N examples of each task alone")
    group.add_argument(
        "--output",
        type=path,
        metavar="FILE",
        help="write the scores here (default: tasks.json in the run's or the model's folder)",
    )


def task_request(values: dict[str, Any], text: dict[str, Any]) -> TaskRequest | None:
    """What the flags ask for; None without --tasks.

    Args:
        values: all flags.
        text: those of them that were given and are about the text.

    Raises:
        UserError: flags that do not go together.
    """
    if values["tasks"] is None:
        for name in ("task_path", "limit", "output"):
            if values[name] is not None:
                raise UserError(f"--{name.replace('_', '-')} goes with --tasks: name the tasks, too")
        return None
    tasks = tuple(task.strip() for task in values["tasks"].split(","))
    if not all(tasks):
        raise UserError(f"--tasks {values['tasks']}: expected names with a comma between them, such as piqa,arc_easy")
    useless = sorted(set(text) - set(_WITH_TASKS)) or ["galore_compatible_eval"] * values["galore_compatible_eval"]
    if useless:
        raise UserError(
            f"--{useless[0].replace('_', '-')} is for the held-out perplexity, and --tasks scores the tasks' own text: "
            "leave one of them out"
        )
    folder, output = (None if values[name] is None else values[name].expanduser() for name in ("task_path", "output"))
    return TaskRequest(tasks=tasks, folder=folder, limit=values["limit"], output=output)


def check_installed() -> None:
    """Raise a UserError where lm_eval, or what it runs transformers' models with, is missing."""
    if any(importlib.util.find_spec(name) is None for name in ("lm_eval", "accelerate")):
        raise UserError(NOT_INSTALLED)


def check_tasks(request: TaskRequest) -> Any:
    """Find the tasks before a model is loaded.

    Returns:
        lm_eval's TaskManager.

    Raises:
        UserError: the folder is not there, or a task is in none of them.
    """
    from lm_eval.tasks import TaskManager  # noqa: PLC0415

    if request.folder is not None and not request.folder.is_dir():
        raise UserError(f"--task-path {request.folder} is no folder: name the one with the tasks' .yaml files")
    folder = None if request.folder is None else str(request.folder)
    if folder is not None:  # lm_eval's own thousands of tasks take seconds to list
        manager = TaskManager(include_path=folder, include_defaults=False)
        if set(request.tasks) <= set(manager.all_tasks):
            return manager
    manager = TaskManager(include_path=folder)
    for task in request.tasks:
        if task not in manager.all_tasks:
            where = "lm_eval" if folder is None else f"lm_eval and {folder}"
            close = difflib.get_close_matches(task, manager.all_tasks)
            meant = f"did you mean {', '.join(close)}? " if close else ""
            raise UserError(f"{where} has no task {task!r}: {meant}`lm_eval ls tasks` lists those of lm_eval")
    return manager


def run_tasks(
    request: TaskRequest,
    manager: Any,
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    *,
    batch_size: int,
    longest: int,
) -> dict[str, Any]:
    """Have lm_eval score a model.

    Args:
        request: the tasks.
        manager: of :func:`check_tasks`.
        model: one of transformers, on its device; left in evaluation mode.
        tokenizer: the one that it was trained with.
        batch_size: sequences at a time.
        longest: tokens of a prompt and its continuation at most; lm_eval cuts from the left.

    Returns:
        lm_eval's results, without the examples.

    Raises:
        UserError: lm_eval fails, for example because a task's data cannot be downloaded.
    """
    from lm_eval import evaluator  # noqa: PLC0415
    from lm_eval.models.huggingface import HFLM  # noqa: PLC0415

    model.eval()
    model.config.use_cache = True  # generation would compute each prefix anew
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every model that is given as an object
    evaluator.get_git_commit_hash = lambda: None  # of the current folder, and git complains where that is no repository
    try:
        found: dict[str, Any] | None = evaluator.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=longest),
            tasks=list(request.tasks),
            task_manager=manager,
            limit=request.limit,
            bootstrap_iters=_BOOTSTRAPS,
            log_samples=False,
        )
    except Exception as error:  # of lm_eval, datasets and the tasks' own code
        raise UserError(f"lm_eval cannot run {', '.join(request.tasks)}: {in_short(error)}") from error
    assert found is not None  # only processes other than the first get nothing
    return found


def write_results(results: dict[str, Any], request: TaskRequest, folder: Path, model: Sequence[str]) -> str:
    """Write results as JSON, and return lm_eval's table with the file's name below it.

    Args:
        results: of :func:`run_tasks`.
        request: where to write; by default tasks.json in ``folder``, or a name with a number if that is taken.
        folder: of the model.
        model: which weights these are, in lines; noted under "scored".
    """
    from lm_eval.utils import make_table  # noqa: PLC0415

    numbered = (folder / f"tasks{'' if number == 1 else f'-{number}'}.json" for number in itertools.count(1))
    file = request.output or next(each for each in numbered if not each.exists())
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"scored": list(model), **results})
    tables = [make_table(results), *([make_table(results, "groups")] if results.get("groups") else [])]
    return "\n".join([*tables, f"wrote {file}"])
