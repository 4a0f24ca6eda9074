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

#: Returns the flat buffers of "exp_avg" or "exp_avg_sq", in the layout of the masters.
Moments = Callable[[str], Field]


@dataclass(frozen=True, kw_only=True)
class Step:
    """The settings of AdamW for one update of a group of parameters.

    Attributes:
        updates: number of updates before this one.
        count: number of this update since the moments were zero, for the bias correction.
        lr, betas, eps, weight_decay: AdamW's; the learning rate includes ramps.
    """

    updates: int
    count: int
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float


class Event(ABC):
    """Base class of events, which the optimizer treats alike.

    It calls :meth:`attach` once, and :meth:`end_update` after the last buffer of each update. A skipped update calls
    neither. :meth:`resets_due` and :meth:`restarts_due` return clocks: "factors", "dense" or both.

    Attributes:
        name: name in the metrics; empty to leave it out.
        needs_layout: whether its tensors are cut as the engine cuts parameters; others can be read at any time.
        restart_warmup_steps: length of the ramp of the learning rate after :meth:`restarts_due`, in updates.
    """

    name: ClassVar[str] = ""
    needs_layout: ClassVar[bool] = True

    restart_warmup_steps: int = 0

    def attach(self, shard: Shard, exchange: Exchange, moments: Moments) -> None:
        """Store the layout of the parameters, once it is known.

        Args:
            shard: the fp32 masters of this rank.
            exchange: communication between the ranks that share them.
            moments: the moments of this rank.
        """
        self._shard, self._exchange, self._moments = shard, exchange, moments

    def due(self, updates: int) -> bool:
        """Return whether the event happens after an update, counted from 1. Define it if there is a :attr:`name`."""
        return False

    def resets_due(self, updates: int) -> set[str]:
        """Return the clocks whose moments become zero after an update, counted from 1."""
        return set()

    def restarts_due(self, updates: int) -> set[str]:
        """Return the clocks whose learning rate warms up again after an update, counted from 1."""
        return set()

    @abstractmethod
    def end_update(self, updates: int) -> list[int]:
        """Run what is due after an update. Collective.

        Args:
            updates: number of updates so far, this one included.

        Returns:
            The indices of the flat buffers that have changed.
        """

    def forget_gradients(self) -> None:  # noqa: B027  (here and below: most keep none)
        """Drop what backward passes have stored in the layers for an update that was skipped."""

    def routes(self) -> dict[str, tuple[int | None, int | None]]:
        """Return, for each parameter that it handles, the rank r and the process that owns it, or None for either."""
        return {}

    def summary(self) -> str:
        """Return a line for the table at the start of a run; empty for none."""
        return ""

    # What it keeps. entries() and numbers() are all of its state; numbers() of layers' events alone are saved. A load
    # calls load_numbers(), make_room(), reads into entries(), and calls settle().

    def numbers(self) -> dict[str, Any]:
        """Return counts as JSON values, the same on every rank: keys are strings, and tuples come back as lists."""
        return {}

    def load_numbers(self, numbers: Mapping[str, Any]) -> None:  # noqa: B027
        """Restore the result of :meth:`numbers`, or a dictionary that contains it."""

    def entries(self) -> dict[str, Entry]:
        """Return what this rank keeps beside weights and moments, as rectangles of logical tensors."""
        return {}

    def make_room(self, saved: Collection[str]) -> None:  # noqa: B027
        """Allocate exactly the tensors with these keys of :meth:`entries`, to be read into.

        A load refuses keys for which no rank has a place; begin yours with a word of your own, "mine/name".
        """

    def settle(self) -> None:  # noqa: B027
        """Use what was read since :meth:`make_room`."""


class LayerEvents(Event):
    """Base class of the events of replaced layers; one object serves all layers of a model.

    The optimizer also calls :meth:`update`, for the flat buffers of its :attr:`group`. A subclass has to define
    :meth:`end_update`, :meth:`numbers` and :meth:`load_numbers`.

    Attributes:
        parametrization: the parametrization, for classes of this package; register yours.
        key: key of its numbers among the optimizer's.
        rewrites: what rewrites both factors of a layer, for the error about a layer of which one is frozen, with the
            type of the layers that train one alone; empty if one may be frozen.
        group: group of parameters that it updates itself; empty to have AdamW do it.
        remainders: what this rank keeps of frozen weights beside the model's, by layer; see
            :class:`~megalr.optim.frozen_weights.FrozenWeights`.
        frozen_weights: what adds to the frozen weights, if they change.
    """

    parametrization: ClassVar[type[Parametrization]]
    key: ClassVar[str] = "layers"
    rewrites: ClassVar[str] = ""
    group: ClassVar[str] = ""

    remainders: dict[str, Tensor]
    frozen_weights: FrozenWeights

    @property
    def made(self) -> int:
        """Number of events since the start of the run."""
        return 0

    def update(self, which: Sequence[int], gradients: Field, step: Step) -> None:
        """Update some of the flat buffers of :attr:`group`. Collective.

        Args:
            which: indices of the buffers, the same on every rank.
            gradients: flat, in the layout of the buffers; may be modified.
            step: settings of AdamW.
        """
        raise NotImplementedError(f"{type(self).__name__} updates nothing itself")

    @abstractmethod
    def numbers(self) -> dict[str, Any]:
        """Return counts as JSON values, the same on every rank."""

    @abstractmethod
    def load_numbers(self, numbers: Mapping[str, Any]) -> None:
        """Restore the result of :meth:`numbers`, or a dictionary that contains it."""

    def merged(self) -> Mapping[str, Tensor]:
        """Return the frozen weights that :attr:`remainders` belong to, by layer."""
        return {}

    def written(self) -> Mapping[str, Tensor]:
        """Return the frozen parameters that the events change, by qualified name; nothing else may train them."""
        return {f"{name}.weight": weight for name, weight in self.merged().items()}

    def entries(self) -> dict[str, Entry]:
        weights = self._with_remainder()
        return {f"remainders/{name}": self.frozen_weights.remainder(name, weight) for name, weight in weights}

    def make_room(self, saved: Collection[str]) -> None:
        if self.merged():  # else there are none, and a user's own class need not have made any
            self.remainders.clear()
        for name, weight in self.merged().items():
            if f"remainders/{name}" in saved:
                self.frozen_weights.make_room(name, weight)

    def settle(self) -> None:
        for name, weight in self._with_remainder():
            self.frozen_weights.settle(name, weight)

    def _with_remainder(self) -> list[tuple[str, Tensor]]:
        return [(name, weight) for name, weight in self.merged().items() if name in self.remainders]
