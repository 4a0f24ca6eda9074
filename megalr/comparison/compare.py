"""Compare methods: each method of a recipe trains the same model on the same text, at the best of its learning rates.

Each run is one `megalr pretrain`. Its result becomes a line of results.jsonl in the output folder and is
not computed again. If the comparison is killed, the same command continues it; with "save_every" in the recipe, runs
that were under way continue from their checkpoints. A failed run does not stop the others; failed runs are listed at
the end, and the same command tries them again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megalr.comparison.figures import draw_figures
from megalr.comparison.results import Results
from megalr.comparison.runs import Recipe
from megalr.comparison.table import markdown, rows_of
from megalr.comparison.trainer import Trainer
from megalr.data import DataConfig
from megalr.data.sources import evaluation_source, training_source
from megalr.errors import UserError
from megalr.flags import PlainParser, nonempty, path, positive
from megalr.locks import FolderLock
from megalr.resources import find
from megalr.train.quiet import quieten
from megalr.train.runner import USER_ERROR_CODE


def main(argv: Sequence[str], *, models_folder: Path, launcher: Sequence[str] = ()) -> int:
    """Run the comparison that the command line describes.

    Args:
        argv: the command line without the program's name.
        models_folder: the folder of the named shapes.
        launcher: what starts a run, as words for Python; empty for the pretrain.py beside ``models_folder``.

    Returns:
        The exit code: 0, or 2 after a UserError, of which the message alone is printed.
    """
    parser = PlainParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    try:
        run(parser.parse_args(argv), models_folder, launcher)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR_CODE
    return 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument(
        "--recipe",
        type=path,
        required=True,
        metavar="FILE.yaml",
        help="what to train: a file, or the name of a shipped recipe, such as paper_smoke",
    )
    parser.add_argument(
        "--output", type=path, required=True, metavar="FOLDER", help="results, table and figures; may hold some already"
    )
    parser.add_argument(
        "--dataset", type=nonempty, nargs="+", metavar="TEXT", help="train on this instead of the recipe's text"
    )
    parser.add_argument(
        "--eval-dataset", type=nonempty, nargs="+", metavar="TEXT", help="with --dataset: the held-out text"
    )
    parser.add_argument(
        "--jobs", type=positive, default=1, metavar="N", help="runs at a time, each with one thread (default: 1)"
    )
    parser.add_argument(
        "--processes", type=positive, default=1, metavar="N", help="of each run, a GPU each where there are GPUs"
    )
    parser.add_argument("--keep-runs", action="store_true", help="keep the runs' folders, checkpoints included")
    parser.add_argument("--report", action="store_true", help="train nothing: report what is there so far")


def run(arguments: argparse.Namespace, models: Path, launcher: Sequence[str] = ()) -> None:
    """Train what is missing, then write and print the table.

    Args:
        arguments: of :func:`add_arguments`.
        models: the folder of the named shapes.
        launcher: what starts a run; see :func:`main`.

    Raises:
        UserError: the recipe cannot be run.
        SystemExit: a run has failed. Its text is what the program prints last; the exit code is then 1.
    """
    quieten(first=True)  # DeepSpeed, which reads every method's JSON before the first run
    if arguments.eval_dataset and not arguments.dataset:
        raise UserError("--eval-dataset goes with --dataset: name the text to train on, too")
    if arguments.dataset:  # before the first of many runs fails at it
        named = DataConfig(dataset=arguments.dataset, eval_dataset=arguments.eval_dataset)
        training_source(named)
        evaluation_source(named)
    text = (arguments.dataset, arguments.eval_dataset or ()) if arguments.dataset else None
    recipe = Recipe(find(arguments.recipe, "recipes"), models, text, world_size=arguments.processes)
    output: Path = arguments.output.expanduser().absolute()
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file: name a folder")
    results = Results(output / "results.jsonl")
    failed: list[str] = []
    if not arguments.report:
        with FolderLock() as lock:
            lock.take(output)
            words = launcher or [str(models.parent / "pretrain.py")]
            trainer = Trainer(results, output / "runs", words, arguments.jobs, arguments.processes)
            trainer.keep = arguments.keep_runs
            try:
                failed = trainer.train_all(recipe)
            except KeyboardInterrupt:
                print("\nstopped; the same command goes on from here", flush=True)
                raise SystemExit(130) from None
    elif not output.is_dir():
        raise UserError(f"there is no folder {output} to report on")
    rows = rows_of(recipe, results.rows())
    table = markdown(recipe, rows)
    (output / "table.md").write_text(table + "\n", encoding="utf-8")
    draw_figures(rows, output)
    print(f"\n{table}", flush=True)
    if failed:
        raise SystemExit("\n".join(["\nerror: these runs failed, and the same command tries them again:", *failed]))
