"""The rules by the name that ``"optimizer": {"type": ...}`` gives them.

The package's own are found: every class in :mod:`megalr.rules` that declares a ``type_name``. Users register theirs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeVar

import megalr.rules
from megalr.discovery import declared_classes
from megalr.errors import UserError
from megalr.plugins import lacking
from megalr.rules.base import Rule

# AdamW is element-wise: it needs no matrices, and is the optimizer's own.
RULES: dict[str, type[Rule] | None] = {"AdamW": None}

R = TypeVar("R", bound=type[Rule])


def register_rule(name: str) -> Callable[[R], R]:
    """Return a decorator that adds a rule under a name; see :mod:`megalr.plugins`.

    Args:
        name: its name in ``"optimizer": {"type": ...}``.

    Raises:
        UserError: the name is taken, or the decorated class is not a complete rule.
    """

    def register(rule: R) -> R:
        if not (isinstance(rule, type) and issubclass(rule, Rule) and dataclasses.is_dataclass(rule)):
            raise UserError(
                f'register_rule("{name}") needs a dataclass that derives from megalr.rules.base.Rule, not {rule!r}'
            )
        missing = lacking(rule, "name")
        if missing:
            raise UserError(f'register_rule("{name}"): {rule.__name__} lacks {missing}; see megalr.rules.base.Rule')
        if canonical(name) in map(canonical, RULES):
            raise UserError(f'there is a rule called "{name}" already: choose another name than {", ".join(RULES)}')
        RULES[name] = rule
        return rule

    return register


def canonical(name: str) -> str:
    """A rule's name without the spellings in which libraries differ: GaLoreAdamW, galore_adamw."""
    return name.lower().replace("_", "").replace("-", "")


def hyperparameters(rule: type[Rule]) -> list[str]:
    """The keys of ``optimizer.params`` that a rule adds."""
    return [field.name for field in dataclasses.fields(rule) if field.name not in rule.unused]  # type: ignore[arg-type]


for _name, _rule in sorted(declared_classes(megalr.rules, Rule, "type_name"), key=lambda found: found[0].lower()):
    register_rule(_name)(_rule)
