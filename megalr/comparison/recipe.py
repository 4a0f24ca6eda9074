"""What a comparison of methods trains: a YAML recipe, read and merged with its base.

Everything that is not the method itself is written once, in the recipe or in its base, a DeepSpeed JSON; what a method
may not set for itself is refused.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from megalr.config.settings import read_json
from megalr.errors import UserError
from megalr.plugins import absolute_plugin
from megalr.resources import names
from megalr.schema import build, check_keys, require

SECTIONS = ("base", "methods", "text")
METHOD_KEYS = ("optimizer", "megalr", "learning_rates", "seeds", "published")
# Parts of the model that every method trains alike: these keys of optimizer.params belong into the base.
SHARED_KEYS = ("adamw", "embedding", "norm")
# Keys of optimizer.params that give the rule the output head and the embeddings, which AdamW trains otherwise.
ENDS = ("head", "embeddings")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The recipe's plain keys.

    Attributes:
        model: the name of a shipped shape (tiny, 9m, ... 7b), or a path.
        steps, batch_size, sequence_length: of every run; a batch is counted in sequences.
        micro_batch_size: sequences at a time; None for the launcher's choice.
        seeds: over which the table averages.
        grid_seed: of the runs that choose the learning rate; it need not be among the seeds.
        save_every: updates between two checkpoints of a run, from which a benchmark that was killed goes on; all of
            them lie on the disk until the run has ended. None for none before its end.
    """

    steps: int
    batch_size: int
    model: str = "tiny"
    sequence_length: int = 256
    micro_batch_size: int | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    grid_seed: int = 0
    save_every: int | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "sequence_length", "save_every"):
            number = getattr(self, name)
            require(number is None or number >= 1, f"{name} is {number}; write at least 1")
        require(bool(self.seeds), "seeds is empty; write e.g. [0, 1, 2]")
        require(len(set(self.seeds)) == len(self.seeds), f"seeds names one twice: {list(self.seeds)}")


@dataclass(frozen=True, kw_only=True)
class Text:
    """The recipe's "text" section: what ``megalr pretrain`` has flags for; without it, the embedded novels.

    Attributes:
        train, validation: lists of files, folders, globs (relative to the recipe) or names of the hub.
        pack: False gives a sequence to each document, truncated or padded.
        dataset_config, tokenizer, text_column, max_train_tokens, max_eval_tokens: see ``--help`` of the launcher.
    """

    train: tuple[str, ...] = ()
    validation: tuple[str, ...] = ()
    dataset_config: str | None = None
    tokenizer: str | None = None
    text_column: str | None = None
    max_train_tokens: int | None = None
    max_eval_tokens: int | None = None
    pack: bool = True


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of the comparison.

    Attributes:
        name: the recipe's.
        config: the DeepSpeed JSON, base included, without a learning rate.
        rates: learning rates to try.
        seeds: over which the table averages this method; empty for the recipe's.
        published: a perplexity to be shown beside the one that was measured, if there is one.
    """

    name: str
    config: dict[str, Any]
    rates: tuple[float, ...]
    seeds: tuple[int, ...] = ()
    published: float | None = None


@dataclass(frozen=True, kw_only=True)
class _Rest:
    """What a method may leave out."""

    seeds: tuple[int, ...] = ()
    published: float | None = None

    def __post_init__(self) -> None:
        require(len(set(self.seeds)) == len(self.seeds), f"seeds names one twice: {list(self.seeds)}")


@dataclass(frozen=True, kw_only=True)
class Content:
    """What a recipe says.

    Attributes:
        settings, text, methods: its parts.
        folder: the recipe's, absolute; relative names start there.
    """

    settings: Settings
    text: Text
    methods: tuple[Method, ...]
    folder: Path


def read_recipe(path: Path) -> Content:
    """Read a recipe and its base.

    Raises:
        UserError: they cannot be read, have unknown keys, or a method sets what all share.
    """
    where, content, folder = path.name, _read(path), path.absolute().parent
    check_keys(content, dict.fromkeys([*(field.name for field in fields(Settings)), *SECTIONS]), where)
    settings = build(Settings, {k: v for k, v in content.items() if k not in SECTIONS}, where)
    text = build(Text, content.get("text") or {}, f"{where}: text")
    base = _base(content.get("base"), folder, where)
    methods = content.get("methods")
    if not isinstance(methods, Mapping) or not methods:
        raise UserError(f'{where} needs "methods": names, each with {", ".join(METHOD_KEYS)}')
    built = tuple(_method(str(name), section, base, folder, where) for name, section in methods.items())
    return Content(settings=settings, text=text, methods=built, folder=folder)


def _method(name: str, section: Any, base: Mapping[str, Any], folder: Path, where: str) -> Method:
    here = f'{where}: method "{name}"'
    if not isinstance(section, Mapping):
        raise UserError(f"{here} must be an object with {', '.join(METHOD_KEYS)}, not {section!r}")
    check_keys(section, dict.fromkeys(METHOD_KEYS), here)
    optimizer = section.get("optimizer")
    if not isinstance(optimizer, Mapping) or "type" not in optimizer:
        raise UserError(f'{here} needs "optimizer" with a "type", e.g. {{type: AdamW}}')
    params = _object(optimizer.get("params"), f"{here}: optimizer.params")
    own = _object(section.get("megalr"), f"{here}: megalr")
    for key in SHARED_KEYS:
        if key in params:
            raise UserError(f"{here} sets optimizer.params.{key}, which is the same for all: write it in the base")
    if "lr" in params:
        raise UserError(f'{here} sets optimizer.params.lr: write "learning_rates" instead')
    if "seed" in own:
        raise UserError(f"{here} sets megalr.seed: write the recipe's seeds instead")
    rates = section.get("learning_rates")
    rates = rates if isinstance(rates, list) else []
    if not rates or not all(isinstance(r, int | float) and not isinstance(r, bool) and r > 0 for r in rates):
        raise UserError(f"{here} needs learning_rates, positive numbers, e.g. [1e-3, 3e-3]")
    if len(set(rates)) < len(rates):
        raise UserError(f"{here} names a learning rate twice: {rates}")
    given = {"optimizer": optimizer, "megalr": _with_plugins(own, folder)}
    rest = build(_Rest, {key: section[key] for key in ("seeds", "published") if key in section}, here)
    config = _merged(_base_of(params, base, here), given, here)
    return Method(name=name, config=config, rates=tuple(map(float, rates)), seeds=rest.seeds, published=rest.published)


def _base_of(params: Mapping[str, Any], base: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """The base without its rate of embeddings and head, which is AdamW's, for a method whose own rule trains both."""
    shared = (base.get("optimizer") or {}).get("params") or {}
    owned = [key for key in ENDS if params.get(key, shared.get(key)) is True]
    if not owned or "embedding" not in shared:
        return base
    if len(owned) < len(ENDS):
        (other,) = set(ENDS) - set(owned)
        raise UserError(
            f'{where} gives its rule the {owned[0]} and leaves the {other} to AdamW, and the "embedding" of the base '
            f'is for both, so that the rule would get AdamW\'s rate: write "{other}": true, too, or neither'
        )
    rest = {key: value for key, value in shared.items() if key != "embedding"}
    return {**base, "optimizer": {**base["optimizer"], "params": rest}}


def _with_plugins(section: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
    """The section with its plugins' paths absolute; they start at the recipe's folder."""
    plugins = section.get("plugins")
    if not isinstance(plugins, list):
        return section
    return {**section, "plugins": [absolute_plugin(n, folder) if isinstance(n, str) else n for n in plugins]}


def _base(given: Any, here: Path, where: str) -> dict[str, Any]:
    if given is None:
        raise UserError(f'{where} needs "base", the path of a DeepSpeed JSON with what all methods share')
    base = read_json(given if isinstance(given, Mapping) else here / Path(str(given)).expanduser())
    optimizer = _object(base.get("optimizer"), f"{where}: the base's optimizer")
    params = _object(optimizer.get("params"), f"{where}: the base's optimizer.params")
    if "lr" in params:
        raise UserError(f"{where}: the base sets optimizer.params.lr, which every method has of its own: remove it")
    if "megalr" in base:
        base["megalr"] = _with_plugins(_object(base["megalr"], f"{where}: the base's megalr"), here)
    return base


def _object(section: Any, where: str) -> Mapping[str, Any]:
    """The section, or an empty one where there is none."""
    if not isinstance(section, Mapping | None):
        raise UserError(f"{where} must be an object, not {section!r}")
    return section or {}


def _merged(base: Mapping[str, Any], given: Mapping[str, Any], where: str, path: str = "") -> dict[str, Any]:
    """Both, section by section; a value that both have is refused."""
    merged = dict(copy.deepcopy(base))
    for key, value in given.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key, {}), Mapping):
            merged[key] = _merged(merged.get(key, {}), value, where, f"{path}{key}.")
        elif key in merged:
            raise UserError(f"{where} sets {path}{key}, which the base sets for all: leave it out of one of them")
        else:
            merged[key] = copy.deepcopy(value)
    return merged


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number, as in JSON, and a key that comes twice is a mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = next((key for index, key in enumerate(keys) if key in keys[:index]), None)
        if twice is not None:
            raise yaml.MarkedYAMLError(problem=f'"{twice}" comes twice', problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"there is no recipe at {path}; ready ones are {', '.join(names('recipes'))}")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except RecursionError:
        raise UserError(f"{path} is not valid YAML: its brackets lie too deep inside each other") from None
    except (yaml.YAMLError, ValueError) as error:  # also bytes that are no UTF-8, and numbers of many digits
        raise UserError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a mapping, not {type(content).__name__}")
    return content
