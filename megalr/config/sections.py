"""The sections of the JSON that are megalr's, each a frozen dataclass that checks its own values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megalr.rules.base import Rule
from megalr.schema import check_ramp, check_targets, require


@dataclass(frozen=True, kw_only=True)
class RefactorizationConfig:
    """Every ``interval`` updates, replace B and A by the balanced pair with the same product.

    Attributes:
        interval: updates between two refactorizations.
        moments: what happens to the moments of the factors. "reset" sets them and their step count to zero,
            "transport" maps them into the new factors, "keep" leaves them. AdamW's first moments and Muon's momentum
            map exactly; second moments do not.
    """

    interval: int
    moments: Literal["reset", "transport", "keep"] = "reset"

    def __post_init__(self) -> None:
        require(self.interval >= 1, f"megalr.refactorization.interval is {self.interval}; write at least 1")


@dataclass(frozen=True, kw_only=True)
class MomentumResetConfig:
    """Every ``interval`` updates, set moments and their step count to zero, then ramp up the learning rate.

    Attributes:
        interval: updates between two resets.
        scope: "factors" resets the low-rank factors, "all" every parameter.
        warmup_steps: length of the linear ramp, from 0.001 of the scheduled learning rate to all of it, for the
            parameters that were reset; shorter than ``interval``. 0: no ramp.
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
    """Settings of one group of parameters; None stands for the optimizer's own value.

    Attributes:
        lr: learning rate.
        betas, eps: AdamW's.
        weight_decay: decoupled weight decay.
    """

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
        lr: learning rate of the matrices; without a rule, of everything but the groups below.
        betas, eps: AdamW's, and those of a rule with moments.
        weight_decay: decoupled weight decay of every matrix.
        rule: what updates matrices, with its hyper-parameters; None for AdamW.
        target_modules: parameters that the rule updates. None: the weights of all linear layers but the output head.
            A list has substrings of qualified names; a string is a regular expression for the whole name. Either
            selects among the parameters of two or three dimensions, embeddings and output head excluded. A
            three-dimensional parameter, such as batched experts, is a stack of matrices.
        head: whether the rule also updates the output head, which may be tied to the embedding. The head is what the
            model's ``get_output_embeddings()`` returns, or else a module called ``lm_head``.
        embeddings: whether the rule also updates the embeddings.
        adamw: overrides for the parameters that the rule does not update; needs a rule.
        embedding: further overrides for embeddings and output head. If the rule updates them, these override the
            optimizer's own values.
        norm: further overrides for norms and biases; their weight decay is 0 unless it is set here.
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
        exchange_bucket_bytes: maximum temporary memory for communication of whole matrices, in bytes.
        seed: random seed.
        plugins: modules or .py files to import, which register methods of your own.
        tp_update: under tensor parallelism, "exact" runs rules on whole matrices, as one process would; "local" runs
            them on the part of each rank, which is another method and sends nothing between these ranks.
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
