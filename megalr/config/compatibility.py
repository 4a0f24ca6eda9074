"""What goes with what: each check compares sections of the JSON that are valid by themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megalr.rules.registry import hyperparameters
from megalr.schema import require

if TYPE_CHECKING:
    from megalr.config.settings import MegalrConfig


def check_compatible(config: MegalrConfig) -> None:
    """Raise a UserError for the first combination of sections that cannot work."""
    for check in (
        refactorization_needs_pairs,
        layers_may_reset_themselves,
        reset_of_factors_needs_factors,
        rule_may_not_train_factors,
        rule_may_not_be_reset,
        factors_are_all_the_rules,
        transport_is_of_known_moments,
        rank_is_within_groups,
    ):
        check(config)


def refactorization_needs_pairs(config: MegalrConfig) -> None:
    """Refactorization balances B and A, so the layers need such a pair."""
    chosen = config.parametrization
    require(
        config.refactorization is None or not chosen.not_refactorized,
        f'megalr.refactorization needs low-rank factors B, A, and "{chosen.type}" {chosen.not_refactorized}: '
        'add "parametrization": {"type": "low_rank", "rank": ...} or remove the section',
    )


def layers_may_reset_themselves(config: MegalrConfig) -> None:
    """Some layers restart their moments themselves, and a momentum reset would be in the way."""
    chosen = config.parametrization
    require(config.momentum_reset is None or not chosen.not_reset, f'"{chosen.type}" {chosen.not_reset}')


def reset_of_factors_needs_factors(config: MegalrConfig) -> None:
    """A momentum reset of "factors" needs factors."""
    reset = config.momentum_reset
    require(
        reset is None or config.parametrization.trains_factors or reset.scope == "all",
        'megalr.momentum_reset.scope is "factors", but there are no low-rank factors: write "scope": "all"',
    )


def rule_may_not_train_factors(config: MegalrConfig) -> None:
    """Some parametrizations are AdamW's alone, and rules that project train no factors."""
    chosen, rule = config.parametrization, config.optimizer.rule
    if rule is None:
        return
    reason = chosen.not_by_rule or (rule.not_for_factors if chosen.trains_factors else "")
    require(
        not reason,
        f'"{chosen.type}" factors cannot be trained with {rule.name}, because {reason}: write "type": "AdamW" in '
        '"optimizer", or remove "megalr.parametrization" to train dense matrices with the rule',
    )


def rule_may_not_be_reset(config: MegalrConfig) -> None:
    """A momentum reset needs moments that a rule can lose."""
    rule = config.optimizer.rule
    if config.momentum_reset is None or rule is None or rule.reset_keys:
        return
    own = '; "moments": "reset" in optimizer.params resets them at each refresh'
    advice = own if "moments" in hyperparameters(type(rule)) else ""
    require(
        False, f"megalr.momentum_reset cannot reset {rule.name}, whose moments go with its bases: remove it{advice}"
    )


def factors_are_all_the_rules(config: MegalrConfig) -> None:
    """A rule gets all factors or none, so it takes no ``target_modules`` of its own."""
    optimizer = config.optimizer
    require(
        not config.parametrization.trains_factors or optimizer.rule is None or optimizer.target_modules is None,
        "the rule trains all factors: remove optimizer.params.target_modules; "
        "megalr.parametrization.target_modules chooses the layers",
    )


def transport_is_of_known_moments(config: MegalrConfig) -> None:
    """A refactorization carries over the moments of AdamW, and states that are linear in the gradients."""
    refactorization, rule = config.refactorization, config.optimizer.rule
    require(
        refactorization is None or refactorization.moments != "transport" or rule is None or bool(rule.linear_keys),
        "megalr.refactorization.moments is \"transport\", which carries AdamW's moments or Muon's momentum: write "
        f'"reset" or "keep" with {rule and rule.name}',
    )


def rank_is_within_groups(config: MegalrConfig) -> None:
    """A basis from gradients needs gradients of its rank, which compressed activations bound."""
    rule, activations = config.optimizer.rule, config.activations
    rank = 0 if getattr(rule, "projector", "random") == "random" else getattr(rule, "rank", 0)
    require(
        activations is None or rank <= activations.groups,
        f"megalr.activations.groups is {activations and activations.groups}, so that gradients have at most this rank, "
        f'and what else is in a basis of rank {rank} is rounding: write "groups" of at least optimizer.params.rank, or '
        "a lower rank",
    )
