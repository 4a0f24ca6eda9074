"""What the optimizer does beside its updates: refactorizations, resets, refreshes, merges, switches of factors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from megalr.layers.base import Parametrization
from megalr.layout.exchange import Exchange, Field
from megalr.layout.rectangles import Entry
from megalr.layout.shard import Shard
from megalr.optim.frozen_weights import FrozenWeights

# Gives the flat buffers of "exp_avg" or "exp_avg_sq", in the masters' layout.
Moments = Callable[[str], Field]


@dataclass(frozen=True, kw_only=True)
class Step:
    """What AdamW does at one update, to all of a group.

    Attributes:
        updates: made before.
        count: of this one since the moments were zero, for the bias correction.
        lr, betas, eps, weight_decay: AdamW's; the ramp is in the learning rate.
    """

    updates: int
    count: int
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float


class Event(ABC):
    """One kind of event; the optimizer treats all kinds alike.

    It calls :meth:`attach` once, and :meth:`end_update` when all buffers of an update have been stepped. A skipped
    update calls neither. :meth:`resets_due` and :meth:`restarts_due` return clocks: "factors", "dense" or both.

    Attributes:
        name: what metrics call it; empty where they do not mention it.
        needs_layout: its tensors lie as the engine cuts parameters; else they can be read at any time.
        restart_warmup_steps: length of the learning rate's ramp after what :meth:`restarts_due` names.
    """

    name: ClassVar[str] = ""
    needs_layout: ClassVar[bool] = True

    restart_warmup_steps: int = 0

    def attach(self, shard: Shard, exchange: Exchange, moments: Moments) -> None:
        """Take note of what lies where, once it is known.

        Args:
            shard: the masters.
            exchange: over their ranks.
            moments: this rank's.
        """
        self._shard, self._exchange, self._moments = shard, exchange, moments

    def due(self, updates: int) -> bool:
        """Whether it happens at the end of an update, counted from 1; needed of those that have a :attr:`name`."""
        return False

    def resets_due(self, updates: int) -> set[str]:
        """The clocks whose moments become zero at the end of an update, counted from 1."""
        return set()

    def restarts_due(self, updates: int) -> set[str]:
        """The clocks whose learning rate warms up again after an update, counted from 1."""
        return set()

    @abstractmethod
    def end_update(self, updates: int) -> list[int]:
        """Do what is due after an update; collective.

        Args:
            updates: made so far, this one included.

        Returns:
            The flat buffers that have changed.
        """

    def forget_gradients(self) -> None:  # noqa: B027  (here and below: most keep none)
        """Drop what backward passes have left in the layers for an update that was skipped."""

    def routes(self) -> dict[str, tuple[int | None, int | None]]:
        """Of each parameter that it looks after: its rank r, and the process that owns it, each if there is one."""
        return {}

    def summary(self) -> str:
        """A line on what there is; empty where the rest says it."""
        return ""

    # What it keeps. entries() and numbers() are all of its state; numbers() of layers' events alone are saved. A load
    # calls load_numbers(), make_room(), reads into entries(), and calls settle().

    def numbers(self) -> dict[str, Any]:
        """Counts, as JSON has them; the same on every rank."""
        return {}

    def load_numbers(self, numbers: Mapping[str, Any]) -> None:  # noqa: B027
        """Take over what :meth:`numbers` gave, or a dictionary that has it among others."""

    def entries(self) -> dict[str, Entry]:
        """What this rank keeps beside the model's weights and the moments, in rectangles of logical tensors."""
        return {}

    def make_room(self, saved: Collection[str]) -> None:  # noqa: B027
        """Have exactly those of its tensors whose keys are among some of :meth:`entries`, to be read into."""

    def settle(self) -> None:  # noqa: B027
        """Go on with what was read since :meth:`make_room`."""


class LayerEvents(Event):
    """The events of a model's replaced layers; one object for all of them.

    Beside what the base class says, the optimizer calls :meth:`update` for flat buffers of its :attr:`group`.

    Attributes:
        parametrization: whose events these are, for classes of this package; a user's are registered.
        key: of its numbers in the optimizer's.
        group: the group of parameters that it updates itself; empty where AdamW does that.
        remainders: what this rank keeps of frozen weights beside the model's, by layer; see
            :class:`~megalr.optim.frozen_weights.FrozenWeights`.
        frozen_weights: what adds to them, where the layers have some that change.
    """

    parametrization: ClassVar[type[Parametrization]]
    key: ClassVar[str] = "layers"
    group: ClassVar[str] = ""

    remainders: dict[str, Tensor]
    frozen_weights: FrozenWeights

    @property
    def made(self) -> int:
        """Events since the start of the run."""
        return 0

    def update(self, which: Sequence[int], gradients: Field, step: Step) -> None:
        """Update what lies in some of the flat buffers, all of :attr:`group`; collective.

        Args:
            which: the buffers, the same on every rank.
            gradients: flat, in the buffers' layout; may be modified.
            step: of AdamW.
        """
        raise NotImplementedError(f"{type(self).__name__} updates nothing itself")

    @abstractmethod
    def numbers(self) -> dict[str, Any]:
        """Counts, as JSON has them; the same on every rank."""

    @abstractmethod
    def load_numbers(self, numbers: Mapping[str, Any]) -> None:
        """Take over what :meth:`numbers` gave, or a dictionary that has it among others."""

    def merged(self) -> Mapping[str, Tensor]:
        """The frozen weights that :attr:`remainders` belong to, by layer."""
        return {}

    def entries(self) -> dict[str, Entry]:
        weights = self._with_remainder()
        return {f"remainders/{name}": self.frozen_weights.remainder(name, weight) for name, weight in weights}

    def make_room(self, saved: Collection[str]) -> None:
        self.remainders.clear()
        for name, weight in self.merged().items():
            if f"remainders/{name}" in saved:
                self.frozen_weights.make_room(name, weight)

    def settle(self) -> None:
        for name, weight in self._with_remainder():
            self.frozen_weights.settle(name, weight)

    def _with_remainder(self) -> list[tuple[str, Tensor]]:
        return [(name, weight) for name, weight in self.merged().items() if name in self.remainders]
