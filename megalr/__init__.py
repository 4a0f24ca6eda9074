"""megalr: low-rank and projected optimizers that pretrain language models at scale under DeepSpeed.

Importing is cheap: nothing is compiled, and DeepSpeed is imported when an engine is made.
"""

from megalr.config import MegalrConfig
from megalr.engine import build_optimizer, consolidated_state_dict, initialize, parametrize, trainer_optimizer
from megalr.errors import GuardError, UserError
from megalr.guards.guard import attach_guard
from megalr.layers.registry import register_parametrization
from megalr.optim import MegalrOptimizer
from megalr.optim.registry import register_events
from megalr.rules.registry import register_rule

__all__ = [
    "GuardError",
    "MegalrConfig",
    "MegalrOptimizer",
    "UserError",
    "attach_guard",
    "build_optimizer",
    "consolidated_state_dict",
    "initialize",
    "parametrize",
    "register_events",
    "register_parametrization",
    "register_rule",
    "trainer_optimizer",
]
