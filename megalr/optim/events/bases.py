"""Which bases projected layers have, and when each is refreshed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megalr.errors import UserError
from megalr.layers.projected import FullGradientSum, ProjectedConfig, ProjectedLinear
from megalr.rules.bases import Projector, Side

COUNTS = ("refreshes", "count", "decay", "due", "waits")


@dataclass(eq=False)
class Basis:
    """A basis, and the layers that have it: one, or those of a group that reads the same input.

    Attributes:
        name: of the first layer's weight; keys random numbers.
        layers: by qualified name, those whose R is trained.
        phase: updates ≡ phase modulo the gap are due for a refresh.
        owner: the rank that computes the basis.
        due: whether a refresh is due and has not been made.
        refreshes: made so far.
        count: updates since R's moments were zero.
        waits: updates that the refresh which is due has waited so far for a gradient that agrees.
        decay: what weight decay has left of W0 since W0 last took R Qᵀ; applied to it when it does so again.
    """

    name: str
    layers: dict[str, ProjectedLinear]
    phase: int = 0
    owner: int = 0
    due: bool = False
    refreshes: int = 0
    count: int = 0
    waits: int = 0
    decay: float = 1.0
    side: Side = field(init=False)

    def __post_init__(self) -> None:
        self.side = self.any_layer.side

    @property
    def any_layer(self) -> ProjectedLinear:
        """One of the layers, for what they share."""
        return next(iter(self.layers.values()))

    def collect(self) -> None:
        """Have the layers add up full gradients from now on if a refresh is due, and drop what they have."""
        for layer in self.layers.values():
            layer.full_gradient = FullGradientSum() if self.due else None

    def refreshed(self, *, resets_moments: bool) -> None:
        """A refresh has been made."""
        self.refreshes, self.decay, self.due, self.waits = self.refreshes + 1, 1.0, False, 0
        self.count = 0 if resets_moments else self.count
        self.collect()


class BasisSchedule:
    """The turns of some bases, spread over the gap between two refreshes.

    Attributes:
        bases: all of them, in the model's order.
    """

    def __init__(self, bases: Sequence[Basis], config: ProjectedConfig) -> None:
        """
        Args:
            bases: new ones.
            config: the "parametrization" section.
        """
        self.bases = list(bases)
        self._config = config
        for index, basis in enumerate(bases):
            basis.phase = index * config.update_proj_gap // len(bases) if config.stagger else 0
            basis.refreshes = int(self.projector(0) == "random")  # it started with one
        self.plan(0)

    def projector(self, updates: int) -> Projector:
        """How a refresh computes its basis after so many updates."""
        start = self._config.random_from
        return "random" if start is not None and updates >= start else self._config.projector

    def plan(self, updates: int) -> None:
        """Note whose turn it is at the update after so many, and have its layers add up full gradients."""
        for basis in self.bases:
            started_random = not updates and basis.refreshes
            basis.due |= updates % self._config.update_proj_gap == basis.phase and not started_random
        self.collect()

    def collect(self) -> None:
        """Drop what the layers have added up, and have those add up from now on whose basis is due."""
        for basis in self.bases:
            basis.collect()

    def numbers(self) -> dict[str, Any]:
        """The counts of every basis."""
        return {basis.name: {key: getattr(basis, key) for key in COUNTS} for basis in self.bases}

    def load_numbers(self, numbers: Mapping[str, Mapping[str, Any]]) -> None:
        """Take over what :meth:`numbers` gave."""
        for basis in self.bases:
            counts = {"waits": 0, **numbers[basis.name]}  # which older checkpoints do not have
            for key in COUNTS:
                setattr(basis, key, counts[key])
        self.collect()


def bases_of(layers: Mapping[str, ProjectedLinear]) -> list[Basis]:
    """The bases of layers by qualified name, of which some share one; layers whose R is not trained have none.

    Raises:
        UserError: layers share a basis, and R is frozen in some of them alone.
    """
    found: dict[int, Basis] = {}
    frozen = {id(layer.basis): name for name, layer in layers.items() if not layer.R.requires_grad}
    for name, layer in layers.items():
        if not layer.R.requires_grad:
            continue
        if id(layer.basis) in frozen:
            raise UserError(
                f"{frozen[id(layer.basis)]}.R is frozen (requires_grad is False), and {name}.R is trained, but the two "
                "layers share one basis, whose refreshes would change what the frozen one computes: freeze both or "
                'train both, or write "share_basis": false in megalr.parametrization'
            )
        if id(layer.basis) in found:
            found[id(layer.basis)].layers[name] = layer
        else:
            found[id(layer.basis)] = Basis(f"{name}.weight", {name: layer})
    return list(found.values())
