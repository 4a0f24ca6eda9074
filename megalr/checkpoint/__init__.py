"""Checkpoints that move between layouts: what is written by one ZeRO stage, world size and TP size any other loads."""

from megalr.checkpoint.loading import Loaded, load_checkpoint
from megalr.checkpoint.manifest import Manifest, newest_valid, problems, read_manifest
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
