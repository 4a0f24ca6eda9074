"""The path by which plugins import what is in :mod:`megalr.optim.events.base`."""

from megalr.optim.events.base import LayerEvents, Moments, Step

__all__ = ["LayerEvents", "Moments", "Step"]
