"""The rules by the name that ``"optimizer": {"type": ...}`` gives them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeVar

from megalr.errors import UserError
from megalr.plugins import lacking
from megalr.rules.adam_mini import AdamMini
from megalr.rules.adarankgrad import AdaRankGrad
from megalr.rules.apollo import Apollo, ApolloMini
from megalr.rules.badam import BAdam
from megalr.rules.base import Rule
from megalr.rules.came import CAME
from megalr.rules.fira import Fira
from megalr.rules.frugal import FRUGAL
from megalr.rules.galore import GaLore
from megalr.rules.golore import GoLore
from megalr.rules.ldadam import LDAdam
from megalr.rules.muon import Muon
from megalr.rules.online_subspace_descent import OnlineSubspaceDescent
from megalr.rules.q_galore import QGaLore
from megalr.rules.scale import SCALE
from megalr.rules.spam import SPAM
from megalr.rules.stable_spam import StableSPAM

# AdamW is element-wise: it needs no matrices, and is the optimizer's own.
RULES: dict[str, type[Rule] | None] = {
    "AdamW": None,
    "GaLoreAdamW": GaLore,
    "GoLoreAdamW": GoLore,
    "FiraAdamW": Fira,
    "APOLLO": Apollo,
    "APOLLOMini": ApolloMini,
    "LDAdamW": LDAdam,
    "OnlineSubspaceDescent": OnlineSubspaceDescent,
    "Muon": Muon,
    "StableSPAM": StableSPAM,
    "SPAM": SPAM,
    "SCALE": SCALE,
    "AdamMini": AdamMini,
    "CAME": CAME,
    "FRUGAL": FRUGAL,
    "BAdam": BAdam,
    "QGaLoreAdamW": QGaLore,
    "AdaRankGrad": AdaRankGrad,
}

R = TypeVar("R", bound=type[Rule])


def register_rule(name: str) -> Callable[[R], R]:
    """A decorator that makes a rule known under a name; see :mod:`megalr.plugins`.

    Args:
        name: what ``"optimizer": {"type": ...}`` calls it.

    Raises:
        UserError: the name is taken, or what is decorated is no rule, or not a whole one.
    """

    def register(rule: R) -> R:
        if not (isinstance(rule, type) and issubclass(rule, Rule) and dataclasses.is_dataclass(rule)):
            raise UserError(
                f'register_rule("{name}") is for dataclasses that derive from megalr.rules.Rule, not {rule!r}'
            )
        missing = lacking(rule, "name")
        if missing:
            raise UserError(f'register_rule("{name}"): {rule.__name__} lacks {missing}; see megalr.rules.base.Rule')
        if plain(name) in map(plain, RULES):
            raise UserError(f'there is a rule called "{name}" already: choose another name')
        RULES[name] = rule
        return rule

    return register


def plain(name: str) -> str:
    """A rule's name without the spellings in which libraries differ: GaLoreAdamW, galore_adamw."""
    return name.lower().replace("_", "").replace("-", "")
