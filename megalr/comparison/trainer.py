"""Train the runs of a comparison that have no result yet, each in processes of its own."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from megalr.comparison.results import Results, best_run, result, score
from megalr.comparison.runs import Recipe, Run
from megalr.data import load_data, load_tokenizer
from megalr.data.overlap import repeated
from megalr.errors import UserError
from megalr.processes import KEEP_FREED_MEMORY, Ended, run_processes
from megalr.train.arguments import parse_arguments
from megalr.train.preparation import data_config
from megalr.train.run_folder import RunFolder


class Trainer:
    """Runs what has no result yet.

    Attributes:
        keep: leave the runs' folders where they are.
    """

    def __init__(self, results: Results, folder: Path, launcher: Sequence[str], jobs: int, processes: int = 1) -> None:
        """
        Args:
            results: what is known, and where to note more.
            folder: of the runs' folders.
            launcher: what starts a run, as words for Python, such as ``launchers/pretrain.py``.
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
        self._train(grid, recipe)
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
        self._train(repeats, recipe)
        return self._failed

    def _train(self, runs: list[Run], recipe: Recipe) -> None:
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
        started = run_processes(
            commands,
            self._folder,
            self._jobs,
            ranks=self._processes,
            gpus=self._gpus,
            environment=KEEP_FREED_MEMORY,
        )
        for ended in started:
            self._note(by_folder[ended.name], ended, recipe)

    def _command(self, one: Run) -> list[str]:
        """The launcher's flags; what a killed benchmark left of the run goes on from its checkpoint, or is deleted."""
        config = self._folder / f"{one.folder}.json"
        _write_private(config, json.dumps(one.config, indent=2) + "\n")
        folder = RunFolder(self._folder / one.folder)
        start = "--overwrite"
        if folder.can_resume:  # of this very run: the folder's name has the key
            start = "--resume"
            folder.summary.unlink(missing_ok=True)  # killed after its last step: the launcher continues no finished run
            self._resumed.add(one.key)
            print(f"{one.title}: goes on from its checkpoint", flush=True)
        return [*self._launcher, "--deepspeed", str(config), *one.flags, "--output", str(folder.path), start]

    def _note(self, one: Run, ended: Ended, recipe: Recipe) -> None:
        folder = RunFolder(self._folder / one.folder)
        self._done += 1
        try:
            row = result(one, folder, ended)
            recipe.check_unchanged()
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


def _write_private(path: Path, text: str) -> None:
    """Write what may hold keys of services, for nobody else to read."""
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)


def _prepare_text(one: Run) -> None:
    """Fill the cache of tokens, which all runs share, as the launcher would.

    There the other processes wait for the first, and a text of the hub may take longer than they have patience.
    """
    print("preparing the text", flush=True)
    arguments = parse_arguments(["--deepspeed", "none", *one.flags])
    text, tokenizer = data_config(arguments, one.seed), load_tokenizer(arguments.tokenizer, say=print)
    data = load_data(text, tokenizer, rank=0, barrier=lambda: None)
    print("\n".join(filter(None, (data.description, repeated(*data.spans)))), flush=True)


def _gpus(needed: int) -> list[str]:
    """So many GPUs by their names in CUDA_VISIBLE_DEVICES; none where there are none."""
    count = torch.cuda.device_count()
    names = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))).split(",")
    if count and needed > count:
        raise UserError(f"--jobs times --processes is {needed}, and there are {count} GPUs: write less of one of them")
    return names[:needed] if count else []
