"""The typed view of the DeepSpeed JSON: its "optimizer" and "megalr" sections.

Everything else in the file is DeepSpeed's and is passed on untouched. A section is a frozen dataclass; a key that is
not a field, a value of another type or out of range is a :class:`~megalr.errors.UserError` that says what to write.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megalr.config.guards import GuardsConfig
from megalr.errors import UserError
from megalr.layers.base import FullConfig, ParametrizationConfig
from megalr.layers.low_rank import LowRankConfig  # noqa: F401  (importable from here, too)
from megalr.layers.projected import ProjectedConfig  # noqa: F401
from megalr.layers.registry import PARAMETRIZATIONS
from megalr.layers.velora import VeloraConfig
from megalr.plugins import load_plugins
from megalr.rules.base import Rule
from megalr.rules.registry import RULES, canonical
from megalr.schema import Json, build, check_keys, check_ramp, check_targets, check_types, nearest, require

# What "auto" stands for in the optimizer's "params" when transformers' TrainingArguments are at hand.
AUTO: dict[str, Callable[[Any], Any]] = {
    "lr": lambda arguments: arguments.learning_rate,
    "betas": lambda arguments: [arguments.adam_beta1, arguments.adam_beta2],
    "eps": lambda arguments: arguments.adam_epsilon,
    "weight_decay": lambda arguments: arguments.weight_decay,
}

# Keys of the optimizer's "params" that mean nothing where AdamW trains everything.
ONLY_WITH_A_RULE = ("adamw", "target_modules", "head", "embeddings")


@dataclass(frozen=True, kw_only=True)
class RefactorizationConfig:
    """Every ``interval`` updates B, A become the balanced pair with the same product.

    Attributes:
        interval: updates between two refactorizations.
        moments: what the factors' moments become: "reset" zeroes them and their step count, "transport" carries
            them into the new factors, "keep" leaves them as they are.
    """

    interval: int
    moments: Literal["reset", "transport", "keep"] = "reset"

    def __post_init__(self) -> None:
        require(self.interval >= 1, f"megalr.refactorization.interval is {self.interval}; write at least 1")


@dataclass(frozen=True, kw_only=True)
class MomentumResetConfig:
    """Every ``interval`` updates the moments and their step count become zero, then the learning rate ramps up.

    Attributes:
        interval: updates between two resets.
        scope: "factors" resets the low-rank factors alone, "all" every parameter.
        warmup_steps: length of the linear ramp, from 0.001 of the scheduled learning rate to all of it; it applies
            to the parameters that were reset; shorter than ``interval``. 0 means no ramp.
    """

    interval: int
    scope: Literal["factors", "all"] = "factors"
    warmup_steps: int = 10

    def __post_init__(self) -> None:
        where = "megalr.momentum_reset"
        require(self.interval >= 1, f"{where}.interval is {self.interval}; write at least 1")
        check_ramp(self, "warmup_steps", "interval", where)


@dataclass(frozen=True, kw_only=True)
class GroupConfig:
    """Settings of one group of parameters; None stands for the optimizer's own value."""

    lr: float | None = None
    betas: tuple[float, float] | None = None
    eps: float | None = None
    weight_decay: float | None = None

    def __post_init__(self) -> None:
        _check_adam(self.lr, self.betas, self.eps, self.weight_decay)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """A rule on the model's matrices, AdamW (arXiv 1711.05101) on everything else; or AdamW on everything.

    Attributes:
        lr: learning rate of the matrices; without a rule, of all but the groups below.
        betas, eps: AdamW's; a rule with moments takes them, too.
        weight_decay: decoupled, of every matrix.
        rule: what updates matrices, with its hyper-parameters; None for AdamW.
        target_modules: which parameters the rule gets. None: the weights of all linear layers but the output head.
            Otherwise, among all parameters of two or three dimensions that are no embedding and no output head, those
            that it names, by substrings of the qualified name or by one regular expression for the whole name. A
            three-dimensional parameter, such as batched experts, is a stack of matrices.
        head: the rule gets the output head, too, which may be tied to the embedding.
        embeddings: the rule gets the embeddings, too.
        adamw: overrides for whatever the rule does not get; without a rule there is no such key.
        embedding: overrides, on top of those, for embeddings and the output head; where the rule has them, on top of
            the optimizer's own values.
        norm: overrides, on top of those, for norms and biases; their weight decay is 0 unless it is set here.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    rule: Rule | None = None
    target_modules: tuple[str, ...] | str | None = None
    head: bool = False
    embeddings: bool = False
    adamw: GroupConfig = field(default_factory=GroupConfig)
    embedding: GroupConfig = field(default_factory=GroupConfig)
    norm: GroupConfig = field(default_factory=GroupConfig)

    def __post_init__(self) -> None:
        _check_adam(self.lr, self.betas, self.eps, self.weight_decay)
        if self.target_modules is not None:
            check_targets(self.target_modules, "optimizer.params.target_modules")


@dataclass(frozen=True, kw_only=True)
class MegalrConfig:
    """All that megalr reads from the JSON.

    Attributes:
        optimizer, parametrization, refactorization, momentum_reset, activations, guards: sections of their own.
        exchange_bucket_bytes: bound of the temporary memory of whole-matrix work.
        seed: key of all random numbers.
        plugins: modules to import for methods of a user's own.
        tp_update: under tensor parallelism "exact" runs rules on whole matrices, as one process would; "local" on each
            rank's part of them, which is another method and sends nothing over tensor-parallel groups.
    """

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parametrization: ParametrizationConfig = field(default_factory=FullConfig)
    refactorization: RefactorizationConfig | None = None
    momentum_reset: MomentumResetConfig | None = None
    activations: VeloraConfig | None = None
    guards: GuardsConfig = field(default_factory=GuardsConfig)
    exchange_bucket_bytes: int = 256 * 1024 * 1024
    seed: int = 0
    plugins: tuple[str, ...] = ()
    tp_update: Literal["exact", "local"] = "exact"

    def __post_init__(self) -> None:
        chosen, rule = self.parametrization, self.optimizer.rule
        name = rule.name if rule else ""
        require(
            self.refactorization is None or not chosen.not_refactorized,
            f'megalr.refactorization needs low-rank factors B, A, and "{chosen.type}" {chosen.not_refactorized}: '
            'add "parametrization": {"type": "low_rank", "rank": ...} or remove the section',
        )
        require(
            self.momentum_reset is None or not chosen.not_reset,
            f'"{chosen.type}" {chosen.not_reset}',
        )
        require(
            self.momentum_reset is None or chosen.trains_factors or self.momentum_reset.scope == "all",
            'megalr.momentum_reset.scope is "factors", but there are no low-rank factors: write "scope": "all"',
        )
        refused = chosen.not_by_rule or (chosen.trains_factors and rule is not None and rule.not_for_factors)
        require(
            rule is None or not refused,
            f'"{chosen.type}" factors cannot be trained with {name}, because {refused}: write "type": "AdamW" in '
            '"optimizer", or remove "megalr.parametrization" to train dense matrices with the rule',
        )
        require(
            self.momentum_reset is None or rule is None or bool(rule.reset_keys),
            f"megalr.momentum_reset cannot reset {name}, whose moments go with its bases: remove it{_own_reset(rule)}",
        )
        require(
            not chosen.trains_factors or rule is None or self.optimizer.target_modules is None,
            "the rule trains all factors: remove optimizer.params.target_modules; "
            "megalr.parametrization.target_modules chooses the layers",
        )
        require(
            self.refactorization is None or rule is None or self.refactorization.moments != "transport",
            'megalr.refactorization.moments is "transport", which carries AdamW\'s moments: write "reset" or "keep" '
            "with another rule",
        )
        groups = None if self.activations is None else self.activations.groups
        rank = 0 if getattr(rule, "projector", "random") == "random" else getattr(rule, "rank", 0)
        require(
            groups is None or rank <= groups,
            f"megalr.activations.groups is {groups}, so that gradients have at most this rank, and what else is in a "
            f'basis of rank {rank} is rounding: write "groups" of at least optimizer.params.rank, or a lower rank',
        )
        require(self.exchange_bucket_bytes >= 1, "megalr.exchange_bucket_bytes must be at least 1")

    @classmethod
    def from_json(cls, config: Json | str | Path) -> MegalrConfig:
        """Read the "optimizer" and "megalr" sections of a DeepSpeed configuration.

        The optimizer may also stand inside the "megalr" section, out of DeepSpeed's and transformers' sight, for jobs
        in which those read the file as well.

        Args:
            config: the file's path, or its content.

        Raises:
            UserError: for anything that is not valid, before anything is built.
        """
        content = read_json(config)
        section = content.get("megalr", {})
        if not isinstance(section, Mapping):
            raise UserError(f'"megalr" must be an object like {{"parametrization": {{...}}}}, not {section!r}')
        known = {f.name: None for f in dataclasses.fields(cls)}
        check_keys(section, known, "megalr")
        plain_keys = ("seed", "exchange_bucket_bytes", "plugins", "tp_update")
        values = check_types(cls, {k: v for k, v in section.items() if k in plain_keys}, "megalr")
        load_plugins(values.get("plugins", ()))
        if "parametrization" in section:
            values["parametrization"] = _parametrization(section["parametrization"])
        if section.get("refactorization") is not None:
            values["refactorization"] = build(
                RefactorizationConfig, section["refactorization"], "megalr.refactorization"
            )
        if section.get("momentum_reset") is not None:
            values["momentum_reset"] = build(MomentumResetConfig, section["momentum_reset"], "megalr.momentum_reset")
        if section.get("activations") is not None:
            values["activations"] = build(VeloraConfig, section["activations"], "megalr.activations")
        if section.get("guards") is not None:
            values["guards"] = build(GuardsConfig, section["guards"], "megalr.guards")
        if "optimizer" in section and "optimizer" in content:
            raise UserError('"optimizer" and "megalr.optimizer" are both given: remove one')
        optimizer = section.get("optimizer", content.get("optimizer", {"type": "AdamW"}))
        return cls(optimizer=_optimizer(optimizer), **values)


def read_json(config: Json | str | Path) -> dict[str, Any]:
    """The DeepSpeed configuration as a dictionary, from a path or as it is; a UserError when it cannot be read."""
    if isinstance(config, Mapping):
        return dict(config)
    path = Path(config)
    if not path.is_file():
        raise UserError(f"no DeepSpeed configuration at {path}; see ds_configs/ for ready ones")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object, not a {type(content).__name__}")
    return content


def fill_auto(content: Json, training_args: Any | None) -> dict[str, Any]:
    """The configuration with each "auto" of the optimizer's "params" replaced, in a copy of what changes.

    Args:
        content: the DeepSpeed configuration.
        training_args: anything with the attributes of ``transformers.TrainingArguments``. None leaves every "auto" out
            instead, for those who do not need the values.
    """
    filled = dict(content)
    section = content.get("megalr")
    if isinstance(section, Mapping) and "optimizer" in section:
        filled["megalr"] = fill_auto(section, training_args)
    optimizer = content.get("optimizer")
    if isinstance(optimizer, Mapping) and isinstance(optimizer.get("params"), Mapping):
        params = dict(optimizer["params"])
        for key in [key for key in AUTO if params.get(key) == "auto"]:
            del params[key]
            if training_args is not None:
                params[key] = AUTO[key](training_args)
        filled["optimizer"] = {**optimizer, "params": params}
    return filled


def _parametrization(section: Any) -> ParametrizationConfig:
    where = "megalr.parametrization"
    if not isinstance(section, Mapping) or "type" not in section:
        raise UserError(f'{where} must be an object with a "type", one of: {", ".join(PARAMETRIZATIONS)}')
    kind = section["type"]
    if not isinstance(kind, str) or kind not in PARAMETRIZATIONS:
        raise UserError(f"{where}.type is {kind!r}{nearest(str(kind), PARAMETRIZATIONS)}")
    chosen = PARAMETRIZATIONS[kind]
    for key, instead in getattr(chosen, "instead", {}).items():
        if key in section:
            raise UserError(f'{where} has no key "{key}" with "type": "{kind}": {instead}')
    return build(chosen, section, where)


def _optimizer(section: Any) -> OptimizerConfig:
    if not isinstance(section, Mapping) or "type" not in section:
        raise UserError(f'"optimizer" must be an object with a "type", one of: {", ".join(RULES)}')
    check_keys(section, {"type": None, "params": None}, "optimizer")
    rules = {canonical(name): rule for name, rule in RULES.items()}
    if not isinstance(section["type"], str):
        raise UserError(f"optimizer.type is {json.dumps(section['type'])}; write one of: {', '.join(RULES)}")
    if canonical(section["type"]) not in rules:
        raise UserError(f"optimizer.type is {section['type']!r}{nearest(str(section['type']), RULES)}")
    rule = rules[canonical(section["type"])]
    params = section.get("params", {})
    where = "optimizer.params"
    if not isinstance(params, Mapping):
        raise UserError(f'{where} must be an object like {{"lr": 1e-3}}, not {json.dumps(params)}')
    rule_fields = [f.name for f in dataclasses.fields(rule) if f.name not in rule.unused] if rule else []  # type: ignore[arg-type]
    own_fields = [f.name for f in dataclasses.fields(OptimizerConfig) if f.name != "rule"]
    if rule is None:
        own_fields = [name for name in own_fields if name not in ONLY_WITH_A_RULE]
    check_keys(params, dict.fromkeys(own_fields + rule_fields), where)
    unresolved = next((key for key in AUTO if params.get(key) == "auto"), None)
    if unresolved is not None:
        raise UserError(
            f'{where}.{unresolved} is "auto"; write a number, or with transformers\' Trainer pass '
            "training_args= to megalr.build_optimizer"
        )
    own: dict[str, Any] = {key: value for key, value in params.items() if key in own_fields}
    for group in ("adamw", "embedding", "norm"):
        if group in own:
            own[group] = build(GroupConfig, own[group], f"{where}.{group}")
    own = {**own, **check_types(OptimizerConfig, {k: v for k, v in own.items() if not _is_group(v)}, where)}
    if rule is None:
        return OptimizerConfig(**own)
    given = {key: value for key, value in params.items() if key in rule_fields}
    defaults = {"lr": rule.default_lr, "eps": rule.default_eps, "betas": getattr(rule, "betas", (0.9, 0.999))}
    return OptimizerConfig(**{**defaults, **own}, rule=build(rule, given, where))


def _own_reset(rule: Rule | None) -> str:
    """The end of a message: how a rule that no momentum reset can reset starts its moments again, if it can."""
    keys = {f.name for f in dataclasses.fields(rule)} - rule.unused if rule else set()  # type: ignore[arg-type]
    return '; "moments": "reset" in optimizer.params resets them at each refresh' if "moments" in keys else ""


def _is_group(value: Any) -> bool:
    return isinstance(value, GroupConfig)


def _check_adam(
    lr: float | None, betas: tuple[float, float] | None, eps: float | None, weight_decay: float | None
) -> None:
    where = "optimizer.params"
    require(lr is None or lr >= 0, f"{where}: lr is {lr}; write a number of at least 0")
    require(betas is None or all(0 <= b < 1 for b in betas), f"{where}: betas are {betas}; both must lie in [0, 1)")
    require(eps is None or eps > 0, f"{where}: eps is {eps}; write a positive number")
    require(weight_decay is None or weight_decay >= 0, f"{where}: weight_decay is {weight_decay}; write at least 0")
