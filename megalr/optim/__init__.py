"""The optimizer class that DeepSpeed steps, and what it runs between updates."""

from megalr.optim.optimizer import MegalrOptimizer

__all__ = ["MegalrOptimizer"]
