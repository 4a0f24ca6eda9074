"""megalr: low-rank and projected optimizers that pretrain language models at scale under DeepSpeed.

Importing is cheap: nothing is compiled, and DeepSpeed is imported when an engine is made.
"""

from typing import TYPE_CHECKING, Any

from megalr.api import build_optimizer, consolidated_state_dict, initialize, parametrize, trainer_optimizer
from megalr.config.settings import MegalrConfig
from megalr.errors import GuardError, UserError
from megalr.guards.adoption import adopt_weights
from megalr.guards.guard import attach_guard
from megalr.layers.registry import register_parametrization
from megalr.optim import MegalrOptimizer
from megalr.optim.events.registry import register_events
from megalr.rules.registry import register_rule

if TYPE_CHECKING:
    from megalr.checkpoint.loading import load_checkpoint
    from megalr.checkpoint.saving import save_checkpoint, wait_for_checkpoint

__all__ = [
    "GuardError",
    "MegalrConfig",
    "MegalrOptimizer",
    "UserError",
    "adopt_weights",
    "attach_guard",
    "build_optimizer",
    "consolidated_state_dict",
    "initialize",
    "load_checkpoint",
    "parametrize",
    "register_events",
    "register_parametrization",
    "register_rule",
    "save_checkpoint",
    "trainer_optimizer",
    "wait_for_checkpoint",
]


def __getattr__(name: str) -> Any:
    """Functions of checkpoints on first use: torch.distributed.checkpoint takes a second to import."""
    if name in ("load_checkpoint", "save_checkpoint", "wait_for_checkpoint"):
        from megalr.checkpoint import loading, saving  # noqa: PLC0415

        return getattr(loading if name == "load_checkpoint" else saving, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
