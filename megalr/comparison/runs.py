"""The trainings that a recipe asks for, and what makes two of them the same.

A recipe in which AdamW would train embeddings, head or norms differently from method to method is refused: a comparison
must not be won there. A method whose own rule trains embeddings and head is compared, and the report says so.
"""

from __future__ import annotations

import copy
import glob
import hashlib
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megalr.comparison.recipe import Method, read_recipe
from megalr.config.secrets import without_secrets
from megalr.config.settings import MegalrConfig
from megalr.errors import UserError
from megalr.hosts import check_config
from megalr.hosts.autotp import tensor_parallel_size
from megalr.layers import parametrize
from megalr.layers.velora import compress_activations
from megalr.optim.groups import ParameterGroup, Settings, parameter_groups
from megalr.train.ds_config import resolve
from megalr.train.models import empty_model, read_model_config
from megalr.train.preparation import request_for
from megalr.version import __version__

if TYPE_CHECKING:
    from transformers import LlamaConfig

# Groups that all methods train alike with AdamW, and the key of optimizer.params that says how. The head is a group of
# its own where a rule has it or the embeddings.
SHARED_GROUPS = {"embedding": "embedding", "head": "embedding", "norm": "norm"}
# Settings that no run's result depends on, or that its key has elsewhere.
NOT_INPUTS = ("model", "seeds", "grid_seed", "save_every")
FILE_PLUGIN = "megalr_plugin_"  # what the names of modules begin with that are files of plugins
VERSIONS_OF = ("torch", "deepspeed", "transformers")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training.

    Attributes:
        method, lr, seed: which.
        config: the DeepSpeed JSON for the launcher.
        resolved: the same without "auto".
        flags: of the launcher, without the JSON and the output.
        inputs: everything else that the result depends on: the model's shape, the text, versions.
    """

    method: str
    lr: float
    seed: int
    config: dict[str, Any]
    resolved: dict[str, Any]
    flags: tuple[str, ...]
    inputs: dict[str, Any]

    @cached_property
    def key(self) -> str:
        """Names the run: equal if and only if everything that determines it is equal. The method's name does not."""
        config = without_secrets(self.resolved)
        rule, parametrization = self.megalr.optimizer.rule, self.megalr.parametrization  # which loads the plugins
        if plugins := (config.get("megalr") or {}).get("plugins"):
            config["megalr"]["plugins"] = [_fingerprint_of_plugin(plugin) for plugin in plugins]
        content = {"config": config, "inputs": self.inputs, "lr": self.lr, "seed": self.seed}
        # Whoever registered them, by an entry point perhaps, of which the JSON says nothing.
        users = {type(each).__module__ for each in (rule, parametrization) if each is not None and not _is_ours(each)}
        if users:
            content["modules"] = [_fingerprint_of_module(module) for module in sorted(users)]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def megalr(self) -> MegalrConfig:
        """The typed view of the JSON."""
        return MegalrConfig.from_json(self.resolved)

    @property
    def rank(self) -> int | None:
        """Of the projection or factorization; None for a method without one."""
        config = self.megalr
        rank = getattr(config.parametrization, "rank", None) or getattr(config.optimizer.rule, "rank", None)
        return None if rank is None else int(rank)

    def groups(self, shape: LlamaConfig) -> list[ParameterGroup]:
        """The method's trainable parameters, of a model without numbers.

        Raises:
            UserError: the method does not fit the model.
        """
        config = self.megalr
        model = parametrize(empty_model(shape), config.parametrization)
        groups = parameter_groups(model, config.optimizer)
        if config.activations is not None:
            compress_activations(model, config.activations)
        return groups

    @property
    def own_ends(self) -> tuple[str, ...]:
        """Which of the embeddings and the head the method's own rule trains, not AdamW as for all others."""
        optimizer = self.megalr.optimizer
        return ("embeddings",) * optimizer.embeddings + ("head",) * optimizer.head

    @property
    def title(self) -> str:
        """For lines of progress."""
        return f"{self.method}, learning rate {self.lr:g}, seed {self.seed}"

    @property
    def folder(self) -> str:
        """A file name that differs from all other runs'."""
        return f"{re.sub('[^A-Za-z0-9]+', '-', self.method).strip('-')}-{self.lr:g}-{self.seed}-{self.key}"


class Recipe:
    """A recipe that has been checked; every run that it can ask for has been built once.

    Attributes:
        settings, methods: what it says.
        model: the shape, a transformers configuration.
        world_size: processes of each run.
    """

    def __init__(
        self,
        path: Path,
        models: Path,
        text: tuple[Sequence[str], Sequence[str]] | None = None,
        *,
        world_size: int = 1,
    ) -> None:
        """
        Args:
            path: of the YAML file.
            models: the folder of the named shapes.
            text: to train on and to hold out instead of the recipe's, as in the launcher's flags.
            world_size: processes of each run.

        Raises:
            UserError: whatever would fail in a run, or make runs incomparable.
        """
        self.world_size = world_size
        content = read_recipe(path)
        self.settings, self.methods, self._text = content.settings, content.methods, content.text
        here = content.folder
        shape = here / Path(self.settings.model).expanduser()
        self._model = str(shape) if shape.is_file() else self.settings.model
        self.model = read_model_config(self._model, models)
        given = content.text
        self._train, self._validation = text or (
            [_beside(name, here) for name in given.train],
            [_beside(name, here) for name in given.validation],
        )
        tokenizer = content.text.tokenizer
        self._tokenizer = None if tokenizer is None else _beside(tokenizer, here)
        self._models = models
        self._stamps = self._read_stamps()  # before what they stand for
        self._inputs = self._read_inputs()
        self._check()

    def check_unchanged(self) -> None:
        """To be called after a run, which has read the files anew.

        Raises:
            UserError: its text, its tokenizer or its model is not what the runs' keys stand for.
        """
        now = {"model": read_model_config(self._model, self._models).to_dict()}
        if self._read_stamps() != self._stamps:
            now |= self._read_inputs()
        changed = [name for name in ("model", "train", "validation", "tokenizer") if name in now]
        changed = [name for name in changed if now[name] != self._inputs[name]]
        if changed:
            names = {"train": self._train, "validation": self._validation, "tokenizer": self._tokenizer}
            what = ", ".join(f"{name} ({names.get(name, self._model)})" for name in changed)
            raise UserError(f"{what} has changed since the comparison began, so the run's result is not noted")

    def run(self, method: Method, lr: float, seed: int) -> Run:
        """The training of a method with a learning rate and a seed."""
        config = copy.deepcopy(method.config)
        config["optimizer"].setdefault("params", {})["lr"] = lr
        cuda = torch.cuda.is_available()
        request = request_for(self.settings, self.model, seed=seed, world_size=self._data_size(config), on_gpu=cuda)
        resolved = resolve(config, request).config
        flags = [*self._flags(), "--seed", str(seed)]
        inputs = {**self._inputs, "device": "cuda" if cuda else "cpu", "processes": self.world_size}
        return Run(
            method=method.name,
            lr=lr,
            seed=seed,
            config=config,
            resolved=resolved,
            flags=tuple(flags),
            inputs=inputs,
        )

    def grid(self, method: Method) -> list[Run]:
        """The runs that choose a method's learning rate."""
        return [self.run(method, lr, self.settings.grid_seed) for lr in method.rates]

    def repeats(self, method: Method, lr: float) -> list[Run]:
        """The runs that the table averages."""
        return [self.run(method, lr, seed) for seed in self.seeds(method)]

    def seeds(self, method: Method) -> tuple[int, ...]:
        """Over which the table averages a method."""
        return method.seeds or self.settings.seeds

    def _data_size(self, config: Mapping[str, Any]) -> int:
        """How many of a run's processes have data of their own."""
        return max(1, self.world_size // tensor_parallel_size(config))

    def _flags(self) -> list[str]:
        settings = self.settings
        flags = ["--model", self._model, "--steps", str(settings.steps), "--batch-size", str(settings.batch_size)]
        flags += ["--sequence-length", str(settings.sequence_length)]
        if settings.micro_batch_size is not None:
            flags += ["--micro-batch-size", str(settings.micro_batch_size)]
        for name, value in vars(self._text).items():
            if value is not None and name not in ("train", "validation", "tokenizer", "pack"):
                flags += [f"--{name.replace('_', '-')}", str(value)]
        flags += [] if self._text.pack else ["--no-pack"]
        flags += [] if self._tokenizer is None else ["--tokenizer", self._tokenizer]
        for flag, names in (("--dataset", self._train), ("--eval-dataset", self._validation)):
            flags += [flag, *names] if names else []
        # Rates are chosen on the first half of the held-out text, the table is made of the second. Evaluations on the
        # way would cost time, and so would checkpoints that nobody has asked for.
        save_every = settings.save_every or settings.steps
        return [*flags, "--test-half", "--eval-every", str(settings.steps), "--save-every", str(save_every)]

    def _read_inputs(self) -> dict[str, Any]:
        return {
            **{k: v for k, v in vars(self.settings).items() if k not in NOT_INPUTS},
            "model": self.model.to_dict(),
            "text": {k: v for k, v in vars(self._text).items() if k not in ("train", "validation", "tokenizer")},
            "table": "test half",  # of the held-out text; rates are chosen on the first
            "train": [_fingerprint(name) for name in self._train],
            "validation": [_fingerprint(name) for name in self._validation],
            "tokenizer": None if self._tokenizer is None else _fingerprint(self._tokenizer),
            "versions": {"megalr": __version__, **{name: version(name) for name in VERSIONS_OF}},
        }

    def _read_stamps(self) -> list[tuple[str, int, int]]:
        """What changes with the content of the files, for less time than that takes to read."""
        names = (*self._train, *self._validation, *([] if self._tokenizer is None else [self._tokenizer]))
        found = [(file, file.stat()) for name in names for file in _files_of(name)]
        return [(str(file), stat.st_size, stat.st_mtime_ns) for file, stat in found]

    def _check(self) -> None:
        """Build every method once, on the meta device, and hold their treatment of the shared parts equal."""
        shared: dict[str, tuple[str, Settings]] = {}
        for method in self.methods:
            for run in self.grid(method):
                try:
                    check_config(_of_one_process(run.resolved), 1)
                    groups = run.groups(self.model)
                except UserError as error:
                    raise UserError(f'method "{method.name}": {error}') from error
                for group in groups:
                    if group.rule is None and (key := SHARED_GROUPS.get(group.name)) is not None:
                        _compare(group, key, run, *shared.setdefault(key, (run.title, group.settings)))


def _compare(group: ParameterGroup, section: str, run: Run, other: str, settings: Settings) -> None:
    for key, value in vars(settings).items():
        mine = getattr(group.settings, key)
        if mine != value:
            raise UserError(
                f'the {key} of the group "{group.name}" would be {mine} with {run.title}, but {value} with {other}: '
                f"write optimizer.params.{section}.{key} in the base, the same for all"
            )


def _of_one_process(config: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON with a batch that suits this process: outside of a process group DeepSpeed takes it for the only one."""
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    return {**config, **dict.fromkeys(sizes, 1)}


def _beside(name: str, folder: Path) -> str:
    """The name as a path beside the recipe if there is such a file, folder or glob; else as it is."""
    path = folder / Path(name).expanduser()
    pattern = str(Path(glob.escape(str(folder))) / Path(name).expanduser())
    return str(path) if path.exists() else pattern if glob.glob(pattern, recursive=True) else name


def _fingerprint(name: str) -> str:
    """Of the content of a file, a folder or what a glob finds; of anything else the name."""
    files = _files_of(name)
    return _digest((file.name, file) for file in files) if files else name


def _files_of(name: str) -> list[Path]:
    """What a name stands for, as the launcher finds it; nothing where it is none of a file, a folder and a glob."""
    path = Path(name).expanduser()
    if path.exists():  # also where its name could be a pattern
        found = sorted(path.rglob("*")) if path.is_dir() else [path]
    else:
        found = [Path(file) for file in sorted(glob.glob(str(path), recursive=True))]
    return [file for file in found if file.is_file()]


def _fingerprint_of_plugin(name: str) -> str:
    return _fingerprint(name) if name.endswith(".py") else _fingerprint_of_module(name)


def _fingerprint_of_module(name: str) -> str:
    """Of the code of the module's outermost package, since one imports the other; of a lone module its own."""
    top = sys.modules.get(name.partition(".")[0])
    folders = [Path(folder) for folder in getattr(top, "__path__", ())]
    files = [(str(file.relative_to(each)), file) for each in folders for file in sorted(each.rglob("*.py"))]
    if not files and (file := getattr(top, "__file__", None)):
        files = [(Path(file).name, Path(file))]
    return _digest(files) if files else name


def _is_ours(method: object) -> bool:
    """Whether a rule or a parametrization is megalr's, or of a plugin's file, which the JSON names."""
    package = type(method).__module__.partition(".")[0]
    return package == "megalr" or package.startswith(FILE_PLUGIN)


def _digest(files: Iterable[tuple[str, Path]]) -> str:
    digest = hashlib.sha256()
    for name, file in files:
        with file.open("rb") as content:
            digest.update(f"{name}\0{hashlib.file_digest(content, 'sha256').hexdigest()}\0".encode())
    return digest.hexdigest()
