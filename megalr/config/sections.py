"""The sections of the JSON that are megalr's, each a frozen dataclass that checks its own values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megalr.rules.base import Rule
from megalr.schema import check_ramp, check_targets, require


@dataclass(frozen=True, kw_only=True)
class RefactorizationConfig:
    """Every ``interval`` updates B, A become the balanced pair with the same product.

    Attributes:
        interval: updates between two refactorizations.
        moments: what the factors' moments become: "reset" zeroes them and their step count, "transport" carries
            them into the new factors, "keep" leaves them as they are. AdamW's second moments have no exact map; its
            first ones and Muon's momentum have.
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
class GeneralConfig:
    """The keys of "megalr" that are no sections.

    Attributes:
        exchange_bucket_bytes: maximum temporary memory for communication of whole matrices.
        seed: random seed.
        plugins: modules to import for methods of a user's own.
        tp_update: under tensor parallelism "exact" runs rules on whole matrices, as one process would; "local" on each
            rank's part of them, which is another method and sends nothing over tensor-parallel groups.
    """

    exchange_bucket_bytes: int = 256 * 1024 * 1024
    seed: int = 0
    plugins: tuple[str, ...] = ()
    tp_update: Literal["exact", "local"] = "exact"

    def __post_init__(self) -> None:
        require(self.exchange_bucket_bytes >= 1, "megalr.exchange_bucket_bytes must be at least 1")
        fits = -(2**63) <= self.seed < 2**63
        require(fits, f"megalr.seed has {len(str(abs(self.seed)))} digits: write a number below 2**63")


def _check_adam(
    lr: float | None, betas: tuple[float, float] | None, eps: float | None, weight_decay: float | None
) -> None:
    where = "optimizer.params"
    require(lr is None or lr >= 0, f"{where}: lr is {lr}; write a number of at least 0")
    require(betas is None or all(0 <= b < 1 for b in betas), f"{where}: betas are {betas}; both must lie in [0, 1)")
    require(eps is None or eps > 0, f"{where}: eps is {eps}; write a positive number")
    require(weight_decay is None or weight_decay >= 0, f"{where}: weight_decay is {weight_decay}; write at least 0")
