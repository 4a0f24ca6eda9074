"""Methods: every method of a recipe trains the same model on the same text, each at the best of its learning rates.

Each run is one process of launchers/pretrain.py. Its result becomes a line of results.jsonl in the output folder and is
not computed again: a benchmark that was killed goes on when it is started again, with "save_every" in the recipe from
the checkpoints of the runs that were under way. A run that fails holds no other up; what has failed is listed at the
end, and tried again at the next start.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from megalr.comparison.methods_report import write_report
from megalr.comparison.results import Results, best_run, result, score
from megalr.comparison.runs import Recipe, Run
from megalr.data import load_data, load_tokenizer
from megalr.errors import UserError
from megalr.processes import Ended, run_processes
from megalr.train.arguments import parse_arguments, positive
from megalr.train.preparation import data_config
from megalr.train.quiet import quieten
from megalr.train.run_folder import RunFolder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument(
        "--recipe", type=Path, required=True, metavar="FILE.yaml", help="what to train, see launchers/recipes"
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FOLDER", help="results, table and figures; may hold some already"
    )
    parser.add_argument("--dataset", nargs="+", metavar="TEXT", help="train on this instead of the recipe's text")
    parser.add_argument("--eval-dataset", nargs="+", metavar="TEXT", help="with --dataset: the held-out text")
    parser.add_argument(
        "--jobs", type=positive, default=1, metavar="N", help="runs at a time, each with one thread (default: 1)"
    )
    parser.add_argument(
        "--processes", type=positive, default=1, metavar="N", help="of each run, a GPU each where there are GPUs"
    )
    parser.add_argument("--keep-runs", action="store_true", help="keep the runs' folders, checkpoints included")
    parser.add_argument("--report", action="store_true", help="train nothing: report what is there so far")


def run(arguments: argparse.Namespace, models: Path) -> None:
    """Train what is missing, then write and print the table.

    Args:
        arguments: of :func:`add_arguments`.
        models: the folder of the named shapes; the launcher lies beside it.

    Raises:
        UserError: the recipe cannot be run.
        SystemExit: a run has failed; with the words that the program ends with, and so with exit code 1.
    """
    quieten(first=True)  # DeepSpeed, which reads every method's JSON before the first run
    if arguments.eval_dataset and not arguments.dataset:
        raise UserError("--eval-dataset goes with --dataset: name the text to train on, too")
    text = (arguments.dataset, arguments.eval_dataset or ()) if arguments.dataset else None
    recipe = Recipe(arguments.recipe, models, text, world_size=arguments.processes)
    output: Path = arguments.output.expanduser().absolute()
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file: name a folder")
    results = Results(output / "results.jsonl")
    failed: list[str] = []
    if not arguments.report:
        output.mkdir(parents=True, exist_ok=True)
        with _locked(output):
            trainer = Trainer(
                results, output / "runs", models.parent / "pretrain.py", arguments.jobs, arguments.processes
            )
            trainer.keep = arguments.keep_runs
            try:
                failed = trainer.train_all(recipe)
            except KeyboardInterrupt:
                print("\nstopped; the same command goes on from here", flush=True)
                raise SystemExit(130) from None
    elif not output.is_dir():
        raise UserError(f"there is no folder {output} to report on")
    print(f"\n{write_report(recipe, results.rows(), output)}", flush=True)
    if failed:
        raise SystemExit("\n".join(["\nerror: these runs failed, and the same command tries them again:", *failed]))


class Trainer:
    """Runs what has no result yet.

    Attributes:
        keep: leave the runs' folders where they are.
    """

    def __init__(self, results: Results, folder: Path, launcher: Path, jobs: int, processes: int = 1) -> None:
        """
        Args:
            results: what is known, and where to note more.
            folder: of the runs' folders.
            launcher: ``launchers/pretrain.py``.
            jobs: runs at a time.
            processes: of each run.

        Raises:
            UserError: there are GPUs, but not one for each process.
        """
        self.keep = False
        self._results, self._folder, self._launcher = results, folder, launcher
        self._jobs, self._processes = jobs, processes
        self._gpus = _gpus(jobs * processes)
        self._done = self._all = 0
        self._failed: list[str] = []
        self._resumed: set[str] = set()  # keys of runs that went on from a checkpoint

    def train_all(self, recipe: Recipe) -> list[str]:
        """First every method's grid, then the best rate of each whole grid with the other seeds.

        Returns:
            A line for each run that has failed, with its log's place.
        """
        settings = recipe.settings
        grid = [run for method in recipe.methods for run in recipe.grid(method)]
        others = {m.name: len(set(recipe.seeds(m)) - {settings.grid_seed}) for m in recipe.methods}
        self._done, self._all = 0, len(grid) + sum(others.values())
        self._train(grid)
        rows = self._results.rows()
        repeats: list[Run] = []
        for method in recipe.methods:
            best = best_run(recipe.grid(method), rows)
            if best is None or math.isinf(score(rows[best.key])):
                words = "a run of its grid failed" if best is None else "every learning rate diverged"
                print(f"{method.name}: {words}; not repeated with other seeds", flush=True)
                self._all -= others[method.name]
                continue
            repeats += [run for run in recipe.repeats(method, best.lr) if run.seed != settings.grid_seed]
        self._train(repeats)
        return self._failed

    def _train(self, runs: list[Run]) -> None:
        rows = self._results.rows()
        missing: dict[str, Run] = {}
        for one in runs:
            if one.key in rows or one.key in missing:
                self._done += 1
            else:
                missing[one.key] = one
        if len(missing) < len(runs):
            print(f"{len(runs) - len(missing)} of {len(runs)} runs are in the results already", flush=True)
        if missing and self._processes > 1:
            _prepare_text(next(iter(missing.values())))
        self._folder.mkdir(exist_ok=True)
        by_folder = {one.folder: one for one in missing.values()}
        commands = {name: self._command(one) for name, one in by_folder.items()}
        for ended in run_processes(commands, self._folder, self._jobs, ranks=self._processes, gpus=self._gpus):
            self._note(by_folder[ended.name], ended)

    def _command(self, one: Run) -> list[str]:
        """The launcher's flags; what a killed benchmark left of the run goes on from its checkpoint, or is deleted."""
        config = self._folder / f"{one.folder}.json"
        config.write_text(json.dumps(one.config, indent=2) + "\n", encoding="utf-8")
        folder = RunFolder(self._folder / one.folder)
        start = "--overwrite"
        if folder.can_resume:  # of this very run: the folder's name has the key
            start = "--resume"
            folder.summary.unlink(missing_ok=True)  # killed after its last step: the launcher continues no finished run
            self._resumed.add(one.key)
            print(f"{one.title}: goes on from its checkpoint", flush=True)
        return [str(self._launcher), "--deepspeed", str(config), *one.flags, "--output", str(folder.path), start]

    def _note(self, one: Run, ended: Ended) -> None:
        folder = RunFolder(self._folder / one.folder)
        self._done += 1
        try:
            row = result(one, folder, ended)
        except UserError as error:
            self._failed.append(f"  {one.title}: {ended.log}")
            print(f"[{self._done}/{self._all}] error: {error}", flush=True)
            if one.key in self._resumed:
                print(f"  it went on from a checkpoint; to train it from its start, delete {folder.path}", flush=True)
            return
        row["resumed"] = one.key in self._resumed  # tokens per second and seconds are of the last part alone
        self._results.append(row)
        perplexity = f"perplexity {score(row):,.2f}"
        if row["tokens_per_second"]:
            perplexity += f", {row['tokens_per_second']:,.0f} tokens/s"
        print(f"[{self._done}/{self._all}] {one.title}: {perplexity}, {ended.seconds:.0f} s", flush=True)
        if not self.keep:
            folder.clear()
            (self._folder / f"{one.folder}.json").unlink(missing_ok=True)
            if folder.path.is_dir() and not any(folder.path.iterdir()):
                folder.path.rmdir()
            ended.log.unlink(missing_ok=True)


def _prepare_text(one: Run) -> None:
    """Fill the cache of tokens, which all runs share, as the launcher would.

    There the other processes wait for the first, and a text of the hub may take longer than they have patience.
    """
    print("preparing the text", flush=True)
    arguments = parse_arguments(["--deepspeed", "none", *one.flags])
    text, tokenizer = data_config(arguments, one.seed), load_tokenizer(arguments.tokenizer)
    print(load_data(text, tokenizer, rank=0, barrier=lambda: None).description, flush=True)


def _gpus(needed: int) -> list[str]:
    """So many GPUs by their names in CUDA_VISIBLE_DEVICES; none where there are none."""
    count = torch.cuda.device_count()
    names = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))).split(",")
    if count and needed > count:
        raise UserError(f"--jobs times --processes is {needed}, and there are {count} GPUs: write less of one of them")
    return names[:needed] if count else []


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep a second benchmark out of the folder; the lock ends with the process, however that ends."""
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"another benchmark is writing to {folder}: wait for it, or name another folder") from error
        yield
