"""Checkpoints that move between layouts: what is written by one ZeRO stage, world size and TP size any other loads.

``python -m megalr.checkpoint`` looks at them, checks them and exports models from them, without an engine.
"""

from typing import TYPE_CHECKING, Any

from megalr.checkpoint.manifest import Manifest, newest_valid, problems, read_manifest

if TYPE_CHECKING:
    from megalr.checkpoint.loading import Loaded, load_checkpoint
    from megalr.checkpoint.saving import save_checkpoint, wait_for_checkpoint

__all__ = [
    "Loaded",
    "Manifest",
    "load_checkpoint",
    "newest_valid",
    "problems",
    "read_manifest",
    "save_checkpoint",
    "wait_for_checkpoint",
]


def __getattr__(name: str) -> Any:
    """What needs an engine, on first use: torch.distributed.checkpoint takes a second to import."""
    if name in ("Loaded", "load_checkpoint"):
        from megalr.checkpoint import loading  # noqa: PLC0415

        return getattr(loading, name)
    if name in ("save_checkpoint", "wait_for_checkpoint"):
        from megalr.checkpoint import saving  # noqa: PLC0415

        return getattr(saving, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
